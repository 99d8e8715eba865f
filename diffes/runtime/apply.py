"""The result, back in diffusers: `apply` a run to a pipeline, `remove` it again, or `load` both in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline

from diffes.adapters import adapter_for, load_pipeline
from diffes.errors import DiffesError
from diffes.pruning.bank import WeightBank, check_fingerprint
from diffes.runtime.artifact import BANK, base_model, read_schedule
from diffes.runtime.router import Router, check_not_offloaded

P = TypeVar("P", bound=DiffusionPipeline)
_ATTRIBUTE = "_diffes_router"


def apply(pipe: P, run: str | Path) -> P:
    """Makes a pipeline run the schedule of a run; from then on only diffusers' own calls are needed.

    Any scheduler, number of steps and guidance will do: routing goes by timestep. Move the pipeline to its device and
    dtype, and load LoRAs, first. `torch.compile` comes after, with `torch._dynamo.config.recompile_limit` above the
    number of different levels, because each is compiled for itself. A run applied before is removed first.

    Args:
        pipe: the pipeline that the run was made for.
        run: the run folder, or one that `diffes export` wrote.

    Returns:
        The same pipeline.

    Raises:
        DiffesError: the run is damaged or was made for another model, or the pipeline is offloaded; it is then as it
            was.
    """
    folder = Path(run)
    schedule, facts = read_schedule(folder)
    adapter = adapter_for(pipe)
    check_not_offloaded(adapter.denoiser)
    bank, header = WeightBank.open(folder / BANK, adapter.dtype)
    if facts.get("split") != header.get("split"):
        raise DiffesError(f"{folder} is damaged: its schedule and its bank split levels over the layers differently")
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


def load(run: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None) -> Any:
    """Opens what a run was made for, with the run applied.

    Args:
        run: a folder that `diffes export` wrote, or a run folder.
        device: "cpu", "cuda", "cuda:1"; "auto" takes cuda where there is one.
        dtype: what the model computes in; as in the search when left out.

    Returns:
        The diffusers pipeline. Its base model comes from the folder, from diffes itself or, by its hub id, from the
        hub: whichever the folder names.

    Raises:
        DiffesError: the folder is damaged, or its base model missing or another.
    """
    folder = Path(run)
    _, facts = read_schedule(folder)
    pipe = load_pipeline(
        base_model(folder, facts), device=pick_device(device), dtype=dtype or getattr(torch, facts["dtype"])
    )
    return apply(pipe, folder)


def pick_device(name: str) -> str:
    """Resolves "auto"."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
