"""The best plan of every cost, by dynamic programming over a table of local errors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from diffes.errors import DiffesError, at_least

Floats = NDArray[np.float64]
T = TypeVar("T")
PENALTY = 1.15  # factor on the errors of a call that a plan found before has made
TRIES = 4  # programmes solved for each plan of `variants`


def in_turn(lists: Iterable[Sequence[T]]) -> list[T]:
    """The first of each list, then the second of each, as long as there are any."""
    return [each for turn in itertools.zip_longest(*lists) for each in turn if each is not None]


@dataclass(frozen=True)
class ErrorTable:
    """What each jump of a plan is believed to add to the error of its result.

    Nodes are in the order of sampling here: node 0 is the noisiest, N is the end of the trajectory. (Genomes have the
    cleanest first.) Errors are non-negative and in one unit, such as mean squared error, each weighted by how it grows
    until the end.

    Args:
        errors: (N, N + 1, K) of one call at node i at level k and the solver's step to node j, or to the end; NaN or
            infinity where that is not allowed. Only i < j is looked at.
        start: (N,) of beginning at node i from pure noise, 0 at the noisiest; infinity where that is not allowed.
        costs: (N, K) positive, of a call at node i at level k.
    """

    errors: Floats
    start: Floats
    costs: Floats

    def __post_init__(self) -> None:
        shapes = self.errors.shape, self.start.shape, self.costs.shape
        n, _, k = self.errors.shape if self.errors.ndim == 3 else (0, 0, 0)
        if not n or shapes != ((n, n + 1, k), (n,), (n, k)):
            raise DiffesError(f"a table of errors is (N, N + 1, K), (N,) starts and (N, K) costs, got {shapes}")
        if not (np.isfinite(self.costs).all() and (self.costs > 0).all()):
            raise DiffesError("costs of calls must be positive numbers")
        if (self.errors < 0).any() or (self.start < 0).any():
            raise DiffesError("errors must not be negative: they are sizes, such as a mean square")

    def predict(self, levels: Sequence[int], power: float = 1.0) -> Forecast:
        """The forecast of any plan (N,), the cleanest node first, K being a skipped one.

        Raises:
            DiffesError: it has another number of nodes or no call.
        """
        path = called(levels, *self.costs.shape)
        ends = [*(node for node, _ in path[1:]), len(levels)]
        parts = [self.start[path[0][0]], *(self.errors[i, j, k] for (i, k), j in zip(path, ends, strict=True))]
        total = float((_allowed(np.array(parts)) ** power).sum() ** (1 / power))
        return Forecast(tuple(levels), float(sum(self.costs[i, k] for i, k in path)), total)


@dataclass(frozen=True)
class Forecast:
    """A plan and what the table says of it.

    Args:
        levels: (N,) genome of a plan space, the cleanest node first: a level below K, or K where the node is skipped.
        cost: of its calls together, in the unit of the table's costs.
        error: the p-norm of the errors of its jumps, in their unit; or where its latents are carried along, their mean
            square deviation at the end.
    """

    levels: tuple[int, ...]
    cost: float
    error: float


def front(
    table: ErrorTable,
    max_cost: float,
    *,
    resolution: int = 400,
    power: float = 1.0,
    allowed: Sequence[int] | None = None,
) -> list[Forecast]:
    """The plans that no other one beats in cost and error, from the cheapest to the best.

    Costs are rounded to whole units while the programme is solved; the costs that are returned are exact. The front is
    exact where all costs are whole units, `max_cost / resolution`.

    Args:
        table: errors, starts and costs.
        max_cost: of the dearest plan.
        resolution: units of cost that the programme counts in, at least 1.
        power: exponent on each error in the sum that is minimised. Errors that are squares add up as squares with 1,
            as if they were independent, and as roots with 0.5, as if all of them pointed the same way.
        allowed: levels of calls; all when left out.

    Raises:
        DiffesError: no plan is allowed within the cost, or the resolution or the power is out of its range.
    """
    levels, units = counted(table.costs, max_cost, resolution, allowed)
    if not 0 < power < np.inf:
        raise DiffesError(f"power must be a positive number, got {power}")
    local, start = _allowed(table.errors[:, :, levels]) ** power, _allowed(table.start) ** power
    value, origin = _programme(local, start, units, resolution + len(units) // 2)  # rounding may add half a unit a call
    plans = genomes(value[None], origin, levels, units, table.costs.shape[1])
    return undominated([table.predict(genome, power) for _, genome in plans], max_cost)


def variants(
    table: ErrorTable,
    budget: float,
    count: int,
    *,
    resolution: int = 400,
    power: float = 1.0,
    allowed: Sequence[int] | None = None,
) -> list[Forecast]:
    """Distinct good plans within a budget, the best first: starts of a search.

    The programme is solved again and again; each time the errors of calls (a node at a level) that the plan before made
    count for a little more, so that the next plan makes others.

    Args:
        table: errors, starts and costs.
        budget: the largest cost.
        count: how many, at least 1; there may be fewer.
        resolution: as for `front`.
        power: as for `front`.
        allowed: as for `front`.

    Raises:
        DiffesError: as for `front`.
    """
    at_least("count", count, 1)
    found: dict[tuple[int, ...], Forecast] = {}
    errors = table.errors.copy()
    for _ in range(count * TRIES):
        near = ErrorTable(errors, table.start, table.costs)
        levels = front(near, budget, resolution=resolution, power=power, allowed=allowed)[-1].levels
        found.setdefault(levels, table.predict(levels, power))
        if len(found) == count:
            break
        for node, level in enumerate(reversed(levels)):
            if level < errors.shape[2]:
                errors[node, :, level] *= PENALTY
    return sorted(found.values(), key=lambda each: each.error)


def called(levels: Sequence[int], n: int, k: int) -> list[tuple[int, int]]:
    """Node and level of each call of a plan (N,), in the order of sampling; K is a skipped node.

    Raises:
        DiffesError: it has another number of nodes or no call.
    """
    if len(levels) != n or min(levels) >= k:
        raise DiffesError(f"a plan of this table has {n} nodes and at least one call, got {levels}")
    return [(node, level) for node, level in enumerate(reversed(levels)) if level < k]


def counted(
    costs: Floats, max_cost: float, resolution: int, allowed: Sequence[int] | None
) -> tuple[list[int], NDArray[np.int_]]:
    """The levels (L,) that are allowed, and the costs (N, L) of calls at them in whole units.

    Raises:
        DiffesError: no call is that cheap, a level is unknown, or the resolution is out of its range.
    """
    at_least("resolution", resolution, 1)
    k = costs.shape[1]
    levels = list(range(k)) if allowed is None else list(allowed)
    if not levels or not {*levels} <= set(range(k)):
        raise DiffesError(f"allowed must be levels in [0, {k - 1}], at least one, got {allowed}")
    smallest = float(costs[:, levels].min())
    if not smallest <= max_cost < np.inf:
        raise DiffesError(f"no plan costs {max_cost} or less: the smallest possible is {smallest:.6g}; raise it")
    return levels, np.maximum(np.rint(costs[:, levels] * (resolution / max_cost)).astype(int), 1)


def genomes(
    value: Floats, origin: NDArray[np.int_], levels: Sequence[int], units: NDArray[np.int_], skip: int
) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Error and the whole plan (N,), the cleanest node first, wherever a programme has found one.

    Args:
        value: (C, limit + 1) of plans that spend so many units, one for each of C classes of them; infinite where there
            is none.
        origin: ((N + 1) C, limit + 1), a row for each node and class: `row * L + level` of the call before; -1 at a
            start.
        levels: (L,) that the programme knows.
        units: (N, L) of calls.
        skip: the value of a skipped node.
    """
    n, classes = len(units), len(value)
    for group, spent in zip(*np.nonzero(np.isfinite(value)), strict=True):
        genome = [skip] * n
        row, left = n * classes + int(group), int(spent)
        while (packed := int(origin[row, left])) >= 0:
            row, level = divmod(packed, len(levels))
            genome[n - 1 - row // classes] = levels[level]
            left -= int(units[row // classes, level])
        yield float(value[group, spent]), tuple(genome)


def undominated(found: Sequence[Forecast], max_cost: float) -> list[Forecast]:
    """Those within the exact cost that no other one beats in cost and error, from the cheapest to the best.

    Raises:
        DiffesError: there is none.
    """
    best: list[Forecast] = []
    for forecast in sorted(found, key=lambda each: (each.cost, each.error)):
        if forecast.cost <= max_cost * (1 + 1e-9) and (not best or forecast.error < best[-1].error):
            best.append(forecast)
    if not best:
        raise DiffesError(
            f"the table allows no plan of cost {max_cost} or less: every way to the end is infinite or dearer; raise "
            "the cost or allow more jumps"
        )
    return best


def _programme(errors: Floats, start: Floats, units: NDArray[np.int_], limit: int) -> tuple[Floats, NDArray[np.int_]]:
    """Smallest sum of errors (limit + 1,) of a whole plan that spends so many units, and how it is come by.

    Args:
        errors: (N, N + 1, K) of jumps.
        start: (N,).
        units: (N, K) of calls.
        limit: units that may be spent.

    Returns:
        The sums, and (N + 1, limit + 1): `node * K + level` of the call before each node at that cost; -1 at a start.
    """
    n, _, k = errors.shape
    value = np.full((n + 1, limit + 1), np.inf)
    value[:n, 0] = start
    origin = np.full((n + 1, limit + 1), -1)
    for node in range(n):
        paid = np.full((k, limit + 1), np.inf)
        for level, cost in enumerate(units[node]):
            if cost <= limit:
                paid[level, cost:] = value[node, : limit + 1 - cost]
        through = errors[node, node + 1 :, :, None] + paid  # (N - node, K, limit + 1)
        level = through.argmin(1)
        best = np.take_along_axis(through, level[:, None], 1)[:, 0]
        better = best < value[node + 1 :]
        value[node + 1 :][better] = best[better]
        origin[node + 1 :][better] = (node * k + level)[better]
    return value[n], origin


def _allowed(errors: Floats) -> Floats:
    """Errors with infinity for what is not allowed."""
    return np.where(np.isnan(errors), np.inf, errors)
