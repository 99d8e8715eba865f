"""What a schedule costs: multiply-accumulates of the whole denoiser, and measured time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffes.adapters.base import ModelAdapter
from diffes.routing import Router
from diffes.schedule import Schedule


@torch.no_grad()
def macs_per_call(adapter: ModelAdapter, timestep: int = 0) -> int:
    """Multiply-accumulates of one denoiser call on a batch of one, with the weights that the timestep is routed to.

    Counted by torch over every matrix product, convolution and attention of the whole network.
    """
    probe = adapter.make_probes(1, 0)
    latents = probe.noise.to(adapter.device, adapter.dtype)
    with FlopCounterMode(display=False) as counter:
        adapter.denoise_once(latents, torch.tensor([timestep]), probe.condition)
    return counter.get_total_flops() // 2


def macs_fraction(router: Router, schedule: Schedule, steps: Sequence[int]) -> float:
    """MACs of a routed sampling run over those of the dense one; `steps` (S,) are the calls per stage."""
    dense = macs_per_call(router.adapter)
    with router.routed(schedule):
        stages = [
            macs_per_call(router.adapter, lo) if n else 0
            for n, (lo, _) in zip(steps, schedule.plan.stages, strict=True)
        ]
    return sum(n * macs for n, macs in zip(steps, stages, strict=True)) / (sum(steps) * dense)


def interleaved_ms(runs: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[float]:
    """Median wall time in milliseconds of each of `runs`, taken in turns so that all see the same machine."""
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for run, taken in zip(runs, times, strict=True):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:  # the first round warms up
                taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]
