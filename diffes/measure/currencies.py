"""What a budget counts: levels, multiply-accumulates of the whole denoiser, or measured time; by registry."""

from __future__ import annotations

import abc
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from diffes.adapters import GroupSet, Kind, ModelAdapter, Probes
from diffes.adapters.macs import macs_per_call, macs_per_group
from diffes.registry import Registry
from diffes.runtime.router import Router
from diffes.search.schedule import Schedule, Stages
from diffes.search.space import SearchSpace

LATENCY_REPEATS = 5
Table = list[list[float]]


class Currency(abc.ABC):
    """What a budget counts; `--cost NAME` finds one by its entry point in `diffes.costs`.

    Attributes:
        counted: whether its table takes a while to make.
        timed: whether it depends on the number of probes, as time does.
        changing: whether the weights of a level are put in place for every call, as plans do, and that is paid for, or
            once a stage.
    """

    counted: ClassVar[bool] = True
    timed: ClassVar[bool] = False
    changing: bool = False

    @abc.abstractmethod
    def table(self, router: Router, stages: Stages, visited: Sequence[int], max_level: int, probes: Probes) -> Table:
        """(S, H + 1) cost of one denoiser call in each stage at each level, in any unit.

        Args:
            router: the model with its bank.
            stages: their ranges of timesteps.
            visited: numbers of the stages with at least one step; rows of others are not used.
            max_level: H.
            probes: the batch of an evaluation.
        """

    def space(self, stages: Stages, steps: Sequence[int], costs: Table, budget: float) -> SearchSpace:
        """Schedules that cost at most `budget` times the dense model, for a table (S, H + 1) of costs."""
        return SearchSpace.dense_fraction(stages, steps, costs, budget)


class Level(Currency):
    """The paper's: the mean level over the steps, as a fraction of H; the budget is the sparsity to reach."""

    counted = False

    def table(self, router: Router, stages: Stages, visited: Sequence[int], max_level: int, probes: Probes) -> Table:
        return [[float(max_level - level) for level in range(max_level + 1)]] * len(stages)

    def space(self, stages: Stages, steps: Sequence[int], costs: Table, budget: float) -> SearchSpace:
        return SearchSpace.mean_sparsity(stages, len(costs[0]) - 1, budget, steps)


class Macs(Currency):
    """Multiply-accumulates of the whole denoiser."""

    def table(self, router: Router, stages: Stages, visited: Sequence[int], max_level: int, probes: Probes) -> Table:
        return macs_by_level(router, stages, visited, max_level)


class Latency(Currency):
    """Median milliseconds on this device, on the batch of an evaluation."""

    timed = True

    def table(self, router: Router, stages: Stages, visited: Sequence[int], max_level: int, probes: Probes) -> Table:
        return ms_by_level(router, stages, visited, max_level, probes, LATENCY_REPEATS, self.changing)


CURRENCIES: Registry[type[Currency]] = Registry("cost", "diffes.costs")


def macs_fraction(router: Router, schedule: Schedule, steps: Sequence[int]) -> float:
    """MACs of a routed sampling run over those of the dense one; `steps` (S,) are the calls per stage."""
    dense = macs_per_call(router.adapter)
    with router.routed(schedule):
        by_stage = [
            macs_per_call(router.adapter, lo) if n else 0
            for n, (lo, _) in zip(steps, schedule.stages.ranges, strict=True)
        ]
    return sum(n * macs for n, macs in zip(steps, by_stage, strict=True)) / (sum(steps) * dense)


@torch.no_grad()
def macs_by_level(router: Router, stages: Stages, visited: Sequence[int], max_level: int) -> Table:
    """(S, H + 1) multiply-accumulates of one denoiser call on a batch of one; in stages not visited those when dense.

    Of width they are the dense model's less what the missing groups would have taken, which is exact; which blocks a
    level skips differs by stage, and blocks need not be alike, so depth is counted call by call.
    """
    adapter, bank = router.adapter, router.bank
    dense = float(macs_per_call(adapter))
    table = [[dense] * (max_level + 1) for _ in range(len(stages))]
    sets, by_group = adapter.prunable(bank.kind), macs_per_group(adapter) if bank.kind == "width" else {}
    for level in range(1, max_level + 1):
        if bank.kind == "width":
            for stage in visited:
                kept = bank.kept((stage, level), sets)
                lost = (by_group[p.name] * (p.n_groups - n) for p, n in zip(sets, kept, strict=True))
                table[stage][level] = dense - sum(lost)
            continue
        with router.routed(_only(stages, visited, level, max_level)):
            for stage in visited:
                table[stage][level] = macs_per_call(adapter, stages.ranges[stage][0])
    return table


@torch.no_grad()
def ms_by_level(
    router: Router,
    stages: Stages,
    visited: Sequence[int],
    max_level: int,
    probes: Probes,
    repeats: int,
    changing: bool = False,
) -> Table:
    """(S, H + 1) median milliseconds of one denoiser call on the probes' batch, levels taking turns.

    Measured in one stage where levels remove the same from all layers in all of them, else in every visited one.
    With `changing`, putting the weights of another level in place is part of a call.
    """
    adapter = router.adapter
    latents = probes.noise.to(adapter.device, adapter.dtype)
    sets, levels = adapter.prunable(router.bank.kind), range(1, max_level + 1)
    shapes = {stage: [router.bank.kept((stage, level), sets) for level in levels] for stage in visited}
    alike = router.bank.kind == "width" and all(shape == shapes[visited[0]] for shape in shapes.values())
    counted = visited[:1] if alike else visited
    table = [[0.0] * (max_level + 1) for _ in range(len(stages))]
    for stage in counted:
        timesteps = torch.full((len(probes),), stages.ranges[stage][0])

        def call(timesteps: Tensor = timesteps) -> None:
            adapter.denoise_once(latents, timesteps, probes.conditions)

        def enter(level: int, stage: int = stage, call: Callable[[], None] = call) -> None:
            router.install(_only(stages, [stage], level, max_level))
            call()

        try:
            entering = [functools.partial(enter, level) for level in range(max_level + 1)]
            if changing:
                table[stage] = interleaved_ms(entering, repeats, adapter.device)
            else:
                table[stage] = interleaved_ms([call] * len(entering), repeats, adapter.device, entering)
        finally:
            router.remove()
    for stage in range(len(stages)):
        if stage not in counted:
            table[stage] = list(table[counted[0]])
    return table


def _only(stages: Stages, where: Sequence[int], level: int, max_level: int) -> Schedule:
    """A schedule of one level in some stages and dense ones elsewhere."""
    return Schedule(stages, tuple(level if s in where else 0 for s in range(len(stages))), max_level)


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
