"""The result, back in diffusers: `apply` a run to a pipeline, and `remove` it again."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from diffusers import DiffusionPipeline

from diffes.adapters import adapter_for
from diffes.bank import WeightBank, check_fingerprint
from diffes.errors import DiffesError
from diffes.folder import BANK, read_schedule
from diffes.routing import Router

P = TypeVar("P", bound=DiffusionPipeline)
_ATTRIBUTE = "_diffes_router"


def apply(pipe: P, run: str | Path) -> P:
    """Makes a pipeline run the schedule of a run; from then on only diffusers' own calls are needed.

    Any scheduler, number of steps and guidance will do: routing goes by timestep. Move the pipeline to its device and
    dtype first. A run applied before is removed first.

    Args:
        pipe: the pipeline that the run was made for.
        run: the run folder.

    Returns:
        The same pipeline.

    Raises:
        DiffesError: the run is damaged or was made for another model; the pipeline is then as it was.
    """
    folder = Path(run)
    schedule, _ = read_schedule(folder)
    adapter = adapter_for(pipe)
    bank, header = WeightBank.load(folder / BANK, adapter.dtype)
    previous: Router | None = getattr(adapter.denoiser, _ATTRIBUTE, None)
    schedule_before = previous.schedule if previous else None
    if previous:
        previous.remove()
    try:
        check_fingerprint(adapter.denoiser, header["fingerprint"], folder / BANK)
        router = Router(adapter, bank)
        router.install(schedule)
    except BaseException:
        if previous and schedule_before:
            previous.install(schedule_before)
        raise
    setattr(adapter.denoiser, _ATTRIBUTE, router)
    return pipe


def remove(pipe: P) -> P:
    """Makes a pipeline dense again, bit for bit.

    Returns:
        The same pipeline.

    Raises:
        DiffesError: no run is applied to it.
    """
    denoiser = adapter_for(pipe).denoiser
    router: Router | None = getattr(denoiser, _ATTRIBUTE, None)
    if router is None:
        raise DiffesError("no run is applied to this pipeline: call diffes.apply(pipe, RUN) first")
    router.remove()
    delattr(denoiser, _ATTRIBUTE)
    return pipe
