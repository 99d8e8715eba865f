"""The result, back in diffusers: `apply` a run to a pipeline, `remove` it again, or `load` both in one line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline

from diffes.adapters import adapter_for, load_pipeline
from diffes.errors import DiffesError
from diffes.pruning.bank import WeightBank, check_bank, check_fingerprint
from diffes.runtime.artifact import BANK, base_model, chosen
from diffes.runtime.checks import check_cuttable, check_not_offloaded
from diffes.runtime.router import Router
from diffes.runtime.solver import scheduler_for
from diffes.search.schedule import Plan, Schedule

P = TypeVar("P", bound=DiffusionPipeline)
_ATTRIBUTE = "_diffes_applied"


@dataclass(frozen=True)
class _Applied:
    """What runs on a pipeline, and the scheduler that it had before, where a plan took its place."""

    router: Router
    scheduler: Any = None


def apply(pipe: P, run: str | Path, *, calls: float | None = None, resident: str = "auto") -> P:
    """Makes a pipeline run the schedule of a run, or a plan of a front; from then on only diffusers' own calls are
    needed.

    Of a schedule, any scheduler, number of steps and guidance will do: routing goes by timestep. A plan brings its own
    solver and timesteps: the pipeline is called with the plan's `num_inference_steps`, and anything else is refused.
    Move the pipeline to its device and dtype, and load LoRAs, first. `torch.compile` comes after, with
    `torch._dynamo.config.recompile_limit` above the number of different levels, because each is compiled for itself. A
    run applied before is removed first.

    Args:
        pipe: the pipeline that the run was made for.
        run: the folder of a run or of a front, or one that `diffes export` wrote.
        calls: of a front, what the plan may cost, in dense denoiser calls; the best one within is taken, and of all
            plans where it is left out.
        resident: which thin layers stay ready on the device: "all" of this schedule, so that a change of stage or level
            moves nothing, "stream" none but those in use, in the memory of the dense weights (see `Router`), or "auto",
            what goes into half of the memory that is free.

    Returns:
        The same pipeline.

    Raises:
        DiffesError: the run is damaged or was made for another model, the pipeline is offloaded, or no plan is as cheap
            as `calls`; the pipeline is then as it was.
    """
    folder = Path(run)
    schedule, facts = chosen(folder, calls)
    adapter = adapter_for(pipe)
    check_not_offloaded(adapter.denoiser)
    check_cuttable(adapter)
    if isinstance(schedule, Schedule):
        adapter.check_sampler()
    bank, header = WeightBank.open(folder / BANK, adapter.dtype)
    if facts.get("split") != header.get("split"):
        raise DiffesError(f"{folder} is damaged: its schedule and its bank split levels over the layers differently")
    if (last := schedule.stages.ranges[-1][1]) != adapter.n_timesteps:
        raise DiffesError(
            f"{folder} has stages of {last} timesteps, and this pipeline {adapter.n_timesteps}: it was made for another"
        )
    previous: _Applied | None = getattr(adapter.denoiser, _ATTRIBUTE, None)
    routed_before = previous.router.schedule if previous else None
    if previous:
        previous.router.remove()
    try:
        needed = bank.for_schedule(schedule)  # and no more, so that no more is kept for reuse than it needs
        router = Router(adapter, needed, resident=resident)
        check_fingerprint(adapter.denoiser, header.get("fingerprint"), folder / BANK)
        check_bank(needed, header, adapter, folder / BANK)
        own = previous.scheduler if previous and previous.scheduler is not None else pipe.scheduler
        planned = scheduler_for(own, schedule.solver, schedule.timesteps) if isinstance(schedule, Plan) else None
        router.install(schedule)
    except BaseException:
        if previous and routed_before:
            previous.router.install(routed_before)
        raise
    pipe.scheduler = own if planned is None else planned
    setattr(adapter.denoiser, _ATTRIBUTE, _Applied(router, None if planned is None else own))
    return pipe


def remove(pipe: P) -> P:
    """Makes a pipeline dense again, bit for bit, and gives it the scheduler back that a plan took the place of.

    Returns:
        The same pipeline.

    Raises:
        DiffesError: no run is applied to it.
    """
    denoiser = adapter_for(pipe).denoiser
    applied: _Applied | None = getattr(denoiser, _ATTRIBUTE, None)
    if applied is None:
        raise DiffesError("no run is applied to this pipeline: call diffes.apply(pipe, RUN) first")
    applied.router.remove()
    if applied.scheduler is not None:
        pipe.scheduler = applied.scheduler
    delattr(denoiser, _ATTRIBUTE)
    return pipe


def load(
    run: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    calls: float | None = None,
    resident: str = "auto",
) -> Any:
    """Opens what a run was made for, with the run applied.

    Args:
        run: a folder that `diffes export` wrote, or the folder of a run or of a front.
        device: "cpu", "cuda", "cuda:1"; "auto" takes cuda where there is one.
        dtype: what the model computes in; as in the search when left out.
        calls: of a front, what the plan may cost, in dense denoiser calls (see `apply`).
        resident: which thin layers stay ready on the device (see `apply`).

    Returns:
        The diffusers pipeline. Its base model comes from the folder, from diffes itself or, by its hub id, from the
        hub: whichever the folder names.

    Raises:
        DiffesError: the folder is damaged, or its base model missing or another.
    """
    folder = Path(run)
    _, facts = chosen(folder, calls)
    pipe = load_pipeline(
        base_model(folder, facts), device=pick_device(device), dtype=dtype or getattr(torch, facts["dtype"])
    )
    return apply(pipe, folder, calls=calls, resident=resident)


def pick_device(name: str) -> str:
    """Resolves "auto".

    Raises:
        DiffesError: the device holds no numbers.
    """
    if name.split(":")[0] == "meta":
        raise DiffesError(f"device {name!r} holds no numbers, so nothing can run there; choose cpu or cuda")
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
