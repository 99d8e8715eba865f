"""Comparison of searches at the same cost: results that cost less than the budget are interpolated to it.

A budget is the most that a schedule may cost, and a few levels or stages cannot express every cost. If the compared
results differ in cost, each search is repeated with as many denoiser calls at a higher budget, at which all of its
schedules cost at least the first limit. The compared value lies on the line between both results, at the first budget.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from diffes.adapters import ClassifierFreeGuidance
from diffes.config import RunConfig
from diffes.results.record import Candidate, RunRecord
from diffes.spaces.space import SearchSpace

TOLERANCE = 0.005  # relative: costs that differ by less count as equal


def calls_of(config: RunConfig) -> int:
    """Return the denoiser calls, in rows, that a cell may spend: `max_calls`, or those of `max_evals` evaluations."""
    if config.max_calls is not None:
        return config.max_calls
    return config.max_evals * config.probes * config.steps * ClassifierFreeGuidance(config.scale).branches


def config_of(settings: Mapping[str, Any]) -> RunConfig:
    """Build the settings from stored ones. Settings that were added later get the values that they had before."""
    known = {field.name for field in fields(RunConfig)}
    return RunConfig(**{"allocation": "equal"} | {name: value for name, value in settings.items() if name in known})


def denser(config: RunConfig, space: SearchSpace) -> RunConfig:
    """Return the settings with a higher budget, at which all schedules cost at least the limit of the present one.

    Args:
        config: the settings.
        space: their schedules. A feasible schedule is below the limit by less than the most expensive step of one
            level.
    """
    dense = space.cost([0] * space.n_stages)
    steps = zip(space.steps, space.level_costs, strict=True)
    more = max(n * max(a - b for a, b in itertools.pairwise(row)) for n, row in steps) / dense
    if config.cost == "level":
        return replace(config, budget=max(0.0, math.floor((config.budget - more) * 1e6) / 1e6))
    return replace(config, budget=min(1.0, math.ceil((config.budget + more) * 1e6) / 1e6))


def target_of(settings: Mapping[str, Any]) -> float:
    """Return the most that a schedule of these settings may cost, as a fraction of the dense model."""
    return 1 - settings["budget"] if settings["cost"] == "level" else float(settings["budget"])


def cost_of(settings: Mapping[str, Any], candidate: Candidate) -> float:
    """Return the cost of a schedule in the currency of its budget, as a fraction of the dense model.

    If it was not recorded, take one less the sparsity for budgets in levels, and the MACs for all others.
    """
    if candidate.cost is not None:
        return candidate.cost
    return 1 - candidate.nominal_sparsity if settings["cost"] == "level" else candidate.macs_fraction


def same(costs: Iterable[float]) -> bool:
    """Check whether costs differ by no more than the tolerance."""
    costs = list(costs)
    return max(costs) <= min(costs) * (1 + TOLERANCE)


def is_off(record: RunRecord) -> bool:
    """Check whether the cost of the schedule found differs from the budget."""
    return not same([cost_of(record.settings, record.searched), target_of(record.settings)])


def at_budget(record: RunRecord) -> RunRecord:
    """Return the record with values at the budget itself, interpolated between its result and that of the budget above.

    Return it unchanged if there is no budget above, or none is needed.
    """
    above = record.above
    if above is None or not is_off(record):
        return record
    target = target_of(record.settings)

    def place(of: Callable[[RunRecord], Candidate]) -> float:
        low, high = cost_of(record.settings, of(record)), cost_of(above.settings, of(above))
        return min(max((target - low) / (high - low), 0.0), 1.0) if high > low else 0.0

    def between(of: Callable[[RunRecord], Candidate]) -> Candidate:
        low, high, weight = of(record), of(above), place(of)
        costs = cost_of(record.settings, low), cost_of(above.settings, high)

        def mixed(a: float | None, b: float | None) -> float | None:
            return None if a is None or b is None else a + weight * (b - a)

        return replace(
            low,
            heldout_mean=mixed(low.heldout_mean, high.heldout_mean),
            heldout_std=mixed(low.heldout_std, high.heldout_std),
            nominal_sparsity=low.nominal_sparsity + weight * (high.nominal_sparsity - low.nominal_sparsity),
            macs_fraction=low.macs_fraction + weight * (high.macs_fraction - low.macs_fraction),
            search=mixed(low.search, high.search),
            cost=costs[0] + weight * (costs[1] - costs[0]),
        )

    return replace(
        record,
        searched=between(lambda run: run.searched),
        uniform=between(lambda run: run.uniform),
        curve=_between(record.curve, above.curve, place(lambda run: run.searched)),
    )


Curve = tuple[tuple[int, float], ...]


def _between(low: Curve, high: Curve, weight: float) -> Curve:
    """Mix the best so far of two searches after each number of calls, from where both have one."""
    if not low or not high:
        return ()
    calls = sorted({n for n, _ in (*low, *high) if n >= max(low[0][0], high[0][0])})

    def at(curve: Curve, n: int) -> float:
        return [best for calls, best in curve if calls <= n][-1]

    return tuple((n, (1 - weight) * at(low, n) + weight * at(high, n)) for n in calls)
