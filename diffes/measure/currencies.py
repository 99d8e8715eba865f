"""Currencies of a budget: levels, multiply-accumulates of the whole denoiser, or measured time; by registry."""

from __future__ import annotations

import abc
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch

from diffes.adapters import ModelAdapter, Probes
from diffes.adapters.macs import call_once, macs_by_module, macs_per_call, macs_per_group
from diffes.plugins import guarded, unexpected
from diffes.progress import Progress, Silent
from diffes.registry import Registry
from diffes.runtime.router import Router
from diffes.solvers.scheduler import PlanScheduler
from diffes.spaces.schedule import Plan, Schedule, Stages
from diffes.spaces.space import SearchSpace, Table

LATENCY_REPEATS = 5
Advance = Callable[[str], None]


def _silent(note: str) -> None:
    """Ignore a note about progress."""


@dataclass(frozen=True)
class Calls:
    """Denoiser calls that a currency is asked the cost of: in each visited stage at each level, `max_level` the last.

    Args:
        router: the model with its bank.
        stages: their ranges of timesteps.
        visited: numbers of the stages with at least one step; rows of others are not used.
        max_level: H.
        probes: the batch of an evaluation.
        changing: whether the weights of a level are put in place for every call, as in plans, and paid for; else once a
            stage.
        advance: progress callback, called with a note after each stage.
    """

    router: Router
    stages: Stages
    visited: Sequence[int]
    max_level: int
    probes: Probes
    changing: bool = False
    advance: Advance = _silent


class Currency(abc.ABC):
    """Currency of a budget; `--cost NAME` finds one by its entry point in `diffes.costs`.

    Attributes:
        counted: whether its table takes a while to make.
        timed: whether it depends on the number of probes, as time does.
    """

    counted: ClassVar[bool] = True
    timed: ClassVar[bool] = False

    @abc.abstractmethod
    def table(self, calls: Calls) -> Table:
        """Return the cost (S, H + 1) of one denoiser call in each stage at each level, in any unit."""

    def space(self, stages: Stages, steps: Sequence[int], costs: Table, budget: float) -> SearchSpace:
        """Return the space of schedules that cost at most `budget` times the dense model, by costs (S, H + 1)."""
        return SearchSpace.dense_fraction(stages, steps, costs, budget)


class Level(Currency):
    """Currency of the paper: the mean level over the steps, as a fraction of H; the budget is the sparsity to reach."""

    counted = False

    def table(self, calls: Calls) -> Table:
        return [[float(calls.max_level - level) for level in range(calls.max_level + 1)]] * len(calls.stages)

    def space(self, stages: Stages, steps: Sequence[int], costs: Table, budget: float) -> SearchSpace:
        return SearchSpace.mean_sparsity(stages, len(costs[0]) - 1, budget, steps)


class Macs(Currency):
    """Multiply-accumulates of the whole denoiser."""

    def table(self, calls: Calls) -> Table:
        return macs_by_level(calls.router, calls.stages, calls.visited, calls.max_level, calls.advance)


class Latency(Currency):
    """Median milliseconds on this device, on the batch of an evaluation."""

    timed = True

    def table(self, calls: Calls) -> Table:
        return ms_by_level(calls, LATENCY_REPEATS)


CURRENCIES: Registry[type[Currency]] = Registry("cost", "diffes.costs", Currency)


def cost(name: str) -> Callable[[type[Currency]], type[Currency]]:
    """Register a subclass of `Currency` under a name, as a decorator; its constructor's parameters are its options."""
    return CURRENCIES.register(name)


def costs_of(
    name: str, router: Router, space: SearchSpace, probes: Probes, progress: Progress, changing: bool
) -> Table:
    """Return the cost (S, H + 1) of a call in a currency, in the stages of a space; show progress if it takes a while.

    Args:
        name: name of the currency.
        router: the model with its bank.
        space: its stages and levels.
        probes: the batch of a call that is timed.
        progress: progress display.
        changing: whether the level's weights are put in place before every call.
    """
    currency: Currency = CURRENCIES.make(name)
    total, told = len(space.visited), 0
    with (progress if currency.counted else Silent()).task(f"{name} by level", total) as advance:

        def tell(note: str) -> None:
            nonlocal told
            told += 1
            advance(note)

        calls = Calls(router, space.stages, space.visited, space.max_level, probes, changing, tell)
        what = f"cost {name!r}"
        wanted = f"return {len(space.stages)} rows of {space.max_level + 1} finite costs above 0 from table"
        with guarded(currency, what, wanted):
            found = currency.table(calls)
            try:
                table = np.asarray(found, dtype=np.float64)
            except (TypeError, ValueError) as error:
                raise unexpected(what, wanted, found) from error
        if table.shape != (len(space.stages), space.max_level + 1):
            raise unexpected(what, wanted, found)
        rows = table[list(space.visited)]
        if not np.isfinite(rows).all() or not (rows[:, 0] > 0).all() or (rows < 0).any():
            raise unexpected(what, wanted, found)
        advance("", total - told)
    costs: Table = np.nan_to_num(table, posinf=0.0, neginf=0.0).tolist()  # of stages without steps, which are not used
    return costs


def macs_fraction(router: Router, routed: Schedule | Plan, steps: Sequence[int]) -> float:
    """Return the MACs of a routed sampling run over those of the dense model at all steps.

    The first call of a run computes everything, even if its level would reuse something.

    Args:
        router: the model with its bank.
        routed: the schedule, or the plan.
        steps: (S,) denoiser calls per stage of the dense run, and of a schedule.
    """
    macs_of = _macs(router, routed.stages)
    dense = macs_of(0, 0)
    if isinstance(routed, Plan):
        return sum(macs_of(*key) for key in Plan.keys(routed)) / (sum(steps) * dense)
    visited = [stage for stage, n in enumerate(steps) if n]
    macs = {stage: macs_of(stage, routed.levels[stage]) for stage in visited}
    total = sum(steps[stage] * macs[stage] for stage in visited)
    if routed.levels[visited[-1]] in router.bank.reusing:
        total += dense - macs[visited[-1]]
    return total / (sum(steps) * dense)


def macs_by_level(
    router: Router, stages: Stages, visited: Sequence[int], max_level: int, advance: Advance = _silent
) -> Table:
    """Return the multiply-accumulates (S, H + 1) of one denoiser call on a batch of one.

    For width they are the dense model's minus what the missing groups would have taken, which is exact. For depth and
    reuse they are counted over a call for each different choice of what is computed. Stages that are not visited get
    those of a dense call.
    """
    macs_of = _macs(router, stages)
    table = [[macs_of(0, 0)] * (max_level + 1) for _ in range(len(stages))]
    for stage in visited:
        table[stage][1:] = [macs_of(stage, level) for level in range(1, max_level + 1)]
        advance(f"stage {stage}")
    return table


@dataclass(frozen=True)
class _Counted:
    """Multiply-accumulates of a model's calls, each counted once, because a count takes a call.

    Args:
        modules: number of modules of the denoiser at that time.
        dense: multiply-accumulates of a dense call.
        by_group: those of a group, by the name of its set; empty if a layer has matrices beside its own, as with a
            LoRA.
        by_choice: those of a call, by what is computed in it.
    """

    modules: int
    dense: float
    by_group: dict[str, float]
    by_choice: dict[object, float]


_COUNTS: WeakKeyDictionary[ModelAdapter, _Counted] = WeakKeyDictionary()


def _counted(adapter: ModelAdapter) -> _Counted:
    names = [name for name, _ in adapter.denoiser.named_modules()]
    if adapter not in _COUNTS or _COUNTS[adapter].modules != len(names):
        counts = macs_by_module(adapter)
        plain = not any("lora_" in name for name in names)
        by_group = macs_per_group(adapter, counts) if plain else {}
        _COUNTS[adapter] = _Counted(len(names), float(counts[""]), by_group, {})
    return _COUNTS[adapter]


def _macs(router: Router, stages: Stages) -> Callable[[int, int], float]:
    """Return a function that gives the multiply-accumulates of one call in a stage at a level."""
    adapter, bank, counted = router.adapter, router.bank, _counted(router.adapter)
    sets = adapter.prunable("width")

    def macs(stage: int, level: int) -> float:
        if level == 0:
            return counted.dense
        entry = bank[stage, level]
        if counted.by_group and set(entry) <= set(counted.by_group):
            kept = bank.kept((stage, level), sets)
            return counted.dense - sum(
                counted.by_group[p.name] * (p.n_groups - n) for p, n in zip(sets, kept, strict=True)
            )
        choice = tuple((name, tuple(weights.kept.tolist())) for name, weights in sorted(entry.items()))
        if choice not in counted.by_choice:
            counted.by_choice[choice] = float(macs_at(router, stages, stage, level))
        return counted.by_choice[choice]

    return macs


@torch.no_grad()
def macs_at(router: Router, stages: Stages, stage: int, level: int) -> int:
    """Return the multiply-accumulates of one denoiser call on a batch of one, in a stage at a level.

    The call follows a dense one if it reuses something of that.
    """
    plan, adapter = _after_dense(router, stages, stage, level), router.adapter
    clock = clock_of(adapter, plan)
    with router.routed(plan), adapter.counted_by(clock):
        for timestep in plan.timesteps[:-1]:
            if level in router.bank.reusing:
                call_once(adapter, timestep)
            clock.index += 1
        return macs_per_call(adapter, plan.timesteps[-1])


def _after_dense(router: Router, stages: Stages, stage: int, level: int) -> Plan:
    """Return a plan of a dense call at the noisiest timestep, and one in a stage at a level."""
    first, then = stages.ranges[-1][1] - 1, stages.ranges[stage][0]
    calls = ((first, 0), (then, level)) if first > then else ((then, level),)
    return Plan(stages, calls, router.max_level, solver="")


def clock_of(adapter: ModelAdapter, plan: Plan) -> PlanScheduler:
    """Return a scheduler that counts the calls of a plan that are made by hand; `index` is the number of the next."""
    return PlanScheduler.of(adapter.pipe.scheduler, plan.timesteps, "ddim")


@torch.no_grad()
def ms_by_level(calls: Calls, repeats: int) -> Table:
    """Return the median milliseconds (S, H + 1) of one denoiser call on the probes' batch, levels taking turns.

    Each call is timed after a dense call, whose outputs a level may reuse. If each level leaves the same sizes in all
    stages, one stage is measured, else every visited one, with fewer repeats.

    A dense call does the same in all stages. So a level's time is divided by that of the dense calls timed in turn with
    it, and multiplied by the median dense call: a machine that slows down on the way makes no stage more expensive. A
    level's time per multiply-accumulate is taken to be the same in all stages, the median: else a search would choose
    the stages in which a level happened to be timed short. With `changing`, putting the level's weights in place of the
    dense ones is part of a call.
    """
    router, stages, visited, max_level = calls.router, calls.stages, calls.visited, calls.max_level
    adapter, bank = router.adapter, router.bank
    sets, levels = adapter.prunable(bank.kind), range(1, max_level + 1)

    def shape(stage: int, level: int) -> list[object]:
        """Return what a call's time depends on: the numbers of groups that stay and, where it matters, which ones."""
        entry = bank[stage, level]
        counts = bank.kept((stage, level), sets)
        which = [entry[p.name].kept.tolist() for p in sets if p.name in entry and not p.interchangeable]
        return [counts, which]

    shapes = {stage: [shape(stage, level) for level in levels] for stage in visited}
    alike = all(each == shapes[visited[0]] for each in shapes.values())
    counted = visited[:1] if alike else visited
    rounds = repeats if len(counted) == 1 else max(2, math.ceil(2 * repeats / len(counted)))

    def measured(n_probes: int) -> Table:
        """Return the times (C, H + 1) of the stages that are counted, on the first `n_probes` probes."""
        part = calls.probes[:n_probes]
        latents = adapter.noise(part)

        def call(clock: PlanScheduler, i: int) -> None:
            clock.index = i
            with adapter.counted_by(clock):
                adapter.denoise_once(latents, torch.full((len(part),), clock.plan[i]), part.conditions)

        def enter(plan: Plan, clock: PlanScheduler, n: int) -> None:
            router.install(plan, keep=True)
            for i in range(n):
                call(clock, i)

        table = []
        for stage in counted:
            plans = [_after_dense(router, stages, stage, level) for level in range(max_level + 1)]
            clocks = [clock_of(adapter, plan) for plan in plans]
            timed = [functools.partial(call, clock, len(clock.plan) - 1) for clock in clocks]
            before = [
                functools.partial(enter, plan, clock, len(plan.calls) - calls.changing)
                for plan, clock in zip(plans, clocks, strict=True)
            ]
            try:
                table.append(interleaved_ms(timed, rounds, adapter.device, before))
            finally:
                router.remove()
            calls.advance(f"stage {stage}")
        return table

    times = np.array(adapter.within_room(measured, len(calls.probes)))
    macs = np.ones((len(stages), max_level + 1))
    if not alike:
        macs = np.array(macs_by_level(router, stages, visited, max_level))
    macs /= macs[:, :1]
    slowness = np.median(times / times[:, :1] / macs[list(counted)], axis=0)
    table: Table = (np.median(times[:, 0]) * slowness * macs).tolist()
    return table


def interleaved_ms(
    runs: Sequence[Callable[[], object]],
    repeats: int,
    device: torch.device,
    before: Sequence[Callable[[], object]] | None = None,
) -> list[float]:
    """Return the median wall time in milliseconds of each of `runs`, in turns so that all see the same machine.

    Args:
        runs: functions to time.
        repeats: rounds that count; one more goes first.
        device: device to wait for before and after each run.
        before: functions to call, untimed, before each run.
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


def prunable_fraction(adapter: ModelAdapter, kind: str) -> float:
    """Return the share of the denoiser's parameters that the last level removes; reuse removes none.

    A sparsity is a fraction of this share.
    """
    denoiser = adapter.denoiser
    prefixes = tuple({each for prunable in adapter.prunable(kind) for each in prunable.removed})
    sizes = {name: parameter.numel() for name, parameter in denoiser.named_parameters()}
    return sum(n for name, n in sizes.items() if name.startswith(prefixes)) / sum(sizes.values())
