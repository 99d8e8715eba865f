"""What a schedule costs: multiply-accumulates of the whole denoiser, and measured time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffes.adapters.base import GroupSet, Kind, ModelAdapter
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
