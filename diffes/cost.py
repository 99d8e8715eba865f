"""What a schedule costs: multiply-accumulates of the whole denoiser, and measured time."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffes.adapters.base import GroupSet, Kind, ModelAdapter, Probes
from diffes.routing import Router
from diffes.schedule import Schedule, StagePlan


@torch.no_grad()
def macs_per_call(adapter: ModelAdapter, timestep: int = 0) -> int:
    """Multiply-accumulates of one denoiser call on a batch of one, with the weights that the timestep is routed to.

    Counted by torch over every matrix product, convolution and attention of the whole network.
    """
    probe = adapter.make_probes(1, 0)
    latents = probe.noise.to(adapter.device, adapter.dtype)
    with FlopCounterMode(display=False) as counter:
        adapter.denoise_once(latents, torch.tensor([timestep]), probe.conditions)
    # by module: text encoders may have run as well
    return sum(counter.get_flop_counts()[type(adapter.denoiser).__name__].values()) // 2


def macs_fraction(router: Router, schedule: Schedule, steps: Sequence[int]) -> float:
    """MACs of a routed sampling run over those of the dense one; `steps` (S,) are the calls per stage."""
    dense = macs_per_call(router.adapter)
    with router.routed(schedule):
        stages = [
            macs_per_call(router.adapter, lo) if n else 0
            for n, (lo, _) in zip(steps, schedule.plan.stages, strict=True)
        ]
    return sum(n * macs for n, macs in zip(steps, stages, strict=True)) / (sum(steps) * dense)


@torch.no_grad()
def macs_by_level(router: Router, plan: StagePlan, visited: Sequence[int], max_level: int) -> list[list[float]]:
    """(S, H + 1) multiply-accumulates of one denoiser call on a batch of one; in stages not visited those when dense.

    All stages lose as many heads and channels at a level, so width is counted in one stage; which blocks a level skips
    differs by stage, and blocks need not be alike.
    """
    dense = float(macs_per_call(router.adapter))
    table = [[dense] * (max_level + 1) for _ in range(len(plan))]
    counted = visited if router.bank.kind == "depth" else visited[:1]
    for level in range(1, max_level + 1):
        with router.routed(_only(plan, counted, level, max_level)):
            for stage in counted:
                table[stage][level] = macs_per_call(router.adapter, plan.stages[stage][0])
    for stage in visited if router.bank.kind == "width" else ():
        table[stage] = list(table[visited[0]])
    return table


@torch.no_grad()
def ms_by_level(
    router: Router, plan: StagePlan, visited: Sequence[int], max_level: int, probes: Probes, repeats: int
) -> list[list[float]]:
    """(S, H + 1) median milliseconds of one denoiser call on the probes' batch, levels taking turns.

    Measured in one stage for width, as MACs are counted; in every visited one for depth.
    """
    adapter = router.adapter
    latents = probes.noise.to(adapter.device, adapter.dtype)
    counted = visited if router.bank.kind == "depth" else visited[:1]
    table = [[0.0] * (max_level + 1) for _ in range(len(plan))]
    for stage in counted:
        timesteps = torch.full((len(probes),), plan.stages[stage][0])

        def call(timesteps: Tensor = timesteps) -> None:
            adapter.denoise_once(latents, timesteps, probes.conditions)

        def enter(level: int, stage: int = stage, call: Callable[[], None] = call) -> None:
            router.install(_only(plan, [stage], level, max_level))
            call()  # the weights are swapped once a stage, not in every call

        levels = range(max_level + 1)
        try:
            before = [functools.partial(enter, level) for level in levels]
            table[stage] = interleaved_ms([call] * len(levels), repeats, adapter.device, before)
        finally:
            router.remove()
    for stage in range(len(plan)):
        if stage not in counted:
            table[stage] = list(table[counted[0]])
    return table


def _only(plan: StagePlan, stages: Sequence[int], level: int, max_level: int) -> Schedule:
    """A schedule of one level in some stages and dense ones elsewhere."""
    return Schedule(plan, tuple(level if s in stages else 0 for s in range(len(plan))), max_level)


def interleaved_ms(
    runs: Sequence[Callable[[], object]],
    repeats: int,
    device: torch.device,
    before: Sequence[Callable[[], object]] | None = None,
) -> list[float]:
    """Median wall time in milliseconds of each of `runs`, taken in turns so that all see the same machine.

    Args:
        runs: what is timed.
        repeats: rounds that count; one more goes first.
        device: waited for before and after each.
        before: what is done, untimed, before each run.
    """
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for prepare, run, taken in zip(before or [lambda: None] * len(runs), runs, times, strict=True):
            prepare()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:  # the first round warms up
                taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


def prunable_fraction(adapter: ModelAdapter, kind: Kind) -> float:
    """Share of the denoiser's parameters that the last level removes: what a sparsity is a fraction of."""
    denoiser = adapter.denoiser
    layers: set[str] = set()
    for prunable in adapter.prunable(kind):
        if isinstance(prunable, GroupSet):
            layers.update(f"{path}." for path in prunable.producers)
            layers.add(f"{prunable.consumer}.weight")  # its bias stays
        else:
            layers.update(f"{path}." for path in prunable.blocks)
    prefixes = tuple(layers)
    sizes = {name: parameter.numel() for name, parameter in denoiser.named_parameters()}
    return sum(n for name, n in sizes.items() if name.startswith(prefixes)) / sum(sizes.values())
