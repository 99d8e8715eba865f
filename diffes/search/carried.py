"""The best plan of every cost, by a dynamic programme that carries the latents of its plans along."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from diffes.errors import at_least
from diffes.search.frontier import Floats, Forecast, called, counted, genomes, undominated

Ints = NDArray[np.int_]
SCALES = (1.0, 0.95, 1.05, 0.9, 1.1)  # of the reaction: the programmes that `variants` solves


@dataclass(frozen=True)
class Trajectory:
    """A dense run over all nodes, and what it takes to foretell where a plan goes instead.

    A call of a plan finds the latents off the dense run's. It predicts what was measured at the dense latents, and
    `reaction` times the deviation; with that the solver's step is made as it is, its second order included. Nothing is
    assumed about how errors add up: they may cancel.

    The latents of all probes are one point here, in R coordinates of which the squares add up to a mean square. Nodes
    are in the order of sampling; N is the end.

    Args:
        states: (N + 1, R) latents of the dense run at each node, and final ones.
        data: (N, K, R) clean latents that are predicted there at each level; NaN where that was not measured.
        signals: (N + 1,) factor on the clean latents at each node, 1 at the end.
        noises: (N + 1,) factor on the noise, 0 at the end.
        reaction: (N,) what a prediction adds to itself for each unit of a deviation.
        costs: (N, K) positive, of a call at a node at a level.
        second: whether the solver is DPM-Solver++ of order 2 (midpoint) instead of 1.
    """

    states: Floats
    data: Floats
    signals: Floats
    noises: Floats
    reaction: Floats
    costs: Floats
    second: bool

    @property
    def logs(self) -> Floats:
        """(N + 1,) logarithm of signal over noise, at the end 0 in place of infinity."""
        return np.append(np.log(self.signals[:-1] / self.noises[:-1]), 0.0)

    def predict(self, levels: Sequence[int]) -> Forecast:
        """The forecast of any plan (N,), the cleanest node first, K being a skipped one.

        Raises:
            DiffesError: it has another number of nodes or no call.
        """
        path = called(levels, *self.costs.shape)
        ends = [*(node for node, _ in path[1:]), len(levels)]
        at, before, clean = self.states[0], -1, self.states[0]
        for (i, k), j in zip(path, ends, strict=True):
            new = self.data[i, k] + self.reaction[i] * (at - self.states[i])
            at = self.step(i, j, at, new, self.reach(i, j, before), clean)
            before, clean = i, new
        error = float(np.square(at - self.states[-1]).sum())
        return Forecast(tuple(levels), float(sum(self.costs[i, k] for i, k in path)), error)

    def reach(self, i: int | Ints, j: int | Ints, before: int | Ints) -> Floats:
        """By how much of its change since the call before, at another node, the solver extends a prediction at node i
        on the way to node j; nothing after the first call (-1) and on the last step.

        Source: diffusers' `DPMSolverMultistepScheduler`, midpoint, `final_sigmas_type="zero"`.
        """
        n, logs = len(self.reaction), self.logs
        extends = self.second & (np.asarray(before) >= 0) & (np.asarray(j) < n)
        return np.where(extends, 0.5 * (logs[j] - logs[i]) / np.where(extends, logs[i] - logs[before], 1.0), 0.0)

    def step(self, i: int | Ints, j: int, at: Floats, clean: Floats, reach: Floats, before: Floats) -> Floats:
        """The latents (..., R) at node j, from those at node i, what is predicted there, and what was before."""
        ratio = np.asarray(self.noises[j] / self.noises[i])[..., None]
        gain = self.signals[j] - np.asarray(self.signals[i])[..., None] * ratio
        return ratio * at + gain * (clean + np.asarray(reach)[..., None] * (clean - before))


def front(
    run: Trajectory, max_cost: float, *, resolution: int = 150, allowed: Sequence[int] | None = None
) -> list[Forecast]:
    """Plans that none of the others beats in cost and error, from the cheapest to the best.

    For each node and cost the programme goes on with one partial plan, whose latents deviate least. As later errors
    may cancel earlier ones, another one could have ended better: the front is not exact.

    Args:
        run: the dense run, what is predicted at it, and costs.
        max_cost: of the dearest plan.
        resolution: units of cost that the programme counts in, at least 1.
        allowed: levels of calls; all when left out.

    Raises:
        DiffesError: no plan is allowed within the cost, or the resolution is out of its range.
    """
    levels, units = counted(run.costs, max_cost, resolution, allowed)
    value, origin = _programme(run, levels, units, resolution + len(units) // 2)
    found = [
        Forecast(genome, float(sum(run.costs[i, k] for i, k in called(genome, *run.costs.shape))), float(value[spent]))
        for spent, genome in genomes(value, origin, levels, units, run.costs.shape[1])
    ]
    return undominated(found, max_cost)


def variants(
    run: Trajectory, budget: float, count: int, *, resolution: int = 150, allowed: Sequence[int] | None = None
) -> list[Forecast]:
    """Distinct plans within a budget, the most promising first: starts of a search.

    The best plans with the reaction as it was measured, a little weaker and stronger; then those that cost just less.

    Args:
        run: as for `front`.
        budget: the largest cost.
        count: how many, at least 1; there may be fewer.
        resolution: as for `front`.
        allowed: as for `front`.

    Raises:
        DiffesError: as for `front`.
    """
    at_least("count", count, 1)
    runs = [replace(run, reaction=run.reaction * scale) for scale in SCALES]
    fronts = [front(each, budget, resolution=resolution, allowed=allowed)[::-1] for each in runs]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*fronts))
    found = dict.fromkeys(forecast.levels for forecast in turns if forecast is not None)
    return [run.predict(levels) for levels in itertools.islice(found, count)]


def _programme(run: Trajectory, levels: Sequence[int], units: Ints, limit: int) -> tuple[Floats, Ints]:
    """Error (limit + 1,) of the whole plan that is found for so many units, and how it is come by.

    Args:
        run: nodes, levels and what happens at them.
        levels: (L,) that are allowed.
        units: (N, L) of calls.
        limit: units that may be spent.

    Returns:
        The errors, and (N + 1, limit + 1): `node * L + level` of the call before each node at that cost; -1 at a start.
    """
    n, width = units.shape
    value = np.full((n + 1, limit + 1), np.inf)
    value[:n, 0] = np.square(run.states[:-1] - run.states[0]).sum(1)
    origin = np.full((n + 1, limit + 1), -1)
    at = np.zeros((n, limit + 1, run.states.shape[1]))

    def last(node: int | Ints, spent: Ints) -> tuple[Ints, Ints, Floats]:
        """Node of the last call before a node, -1 at a start; units spent before it; clean latents it predicted."""
        packed = origin[node, spent]
        before, level = packed // width, packed % width
        left = np.where(packed < 0, 0, spent - units[before, level])
        clean = run.data[before, np.asarray(levels)[level]]
        clean = clean + run.reaction[before, None] * (at[before, left] - run.states[before])
        return before, left, np.where(packed[:, None] < 0, 0.0, clean)

    at[:, 0] = run.states[0]
    for i in range(n):
        spent = np.flatnonzero(np.isfinite(value[i]))
        before, left, clean = last(i, spent)
        begun = before >= 0
        earlier, _, past = last(before[begun], left[begun])
        reach = run.reach(before[begun], i, earlier)
        at[i, spent[begun]] = run.step(before[begun], i, at[before, left][begun], clean[begun], reach, past)
        errors = _errors(run, i, levels, at[i, spent], before, clean)
        for level, cost in enumerate(units[i]):
            paid = spent + cost <= limit
            new, old = errors[:, level, paid], value[i + 1 :, spent[paid] + cost]
            node, column = np.nonzero(new < old)
            to = i + 1 + node, spent[paid][column] + cost
            value[to] = new[node, column]
            origin[to] = i * width + level
    return value[n], origin


def _errors(run: Trajectory, i: int, levels: Sequence[int], at: Floats, before: Ints, clean: Floats) -> Floats:
    """(N - i, L, C) mean square deviation at each later node and the end, after a call at node i at each level.

    With d the deviation now, p the prediction before and x that of the call, a step leaves a d + u x - v p + w, where
    a, u, v depend on where it goes and w is constant: only their inner products are needed, none of the sums.

    Args:
        run: the dense run.
        i: the node.
        levels: (L,).
        at: (C, R) latents of partial plans at node i.
        before: (C,) node of the call before; -1 if there is none.
        clean: (C, R) what that predicted.
    """
    after = np.arange(i + 1, len(run.states))
    ratio = run.noises[after] / run.noises[i]
    gain = (run.signals[after] - run.signals[i] * ratio)[:, None]
    v = gain * run.reach(i, after[:, None], before)
    u = gain + v
    d, p, x, w = at - run.states[i], clean, run.data[i, levels], ratio[:, None] * run.states[i] - run.states[after]
    a = ratio[:, None] + u * run.reaction[i]
    of_plan = a**2 * _dot(d, d) + v**2 * _dot(p, p) - 2 * a * v * _dot(d, p)
    of_plan += _dot(w, w)[:, None] + 2 * (a * (w @ d.T) - v * (w @ p.T))
    mixed = a[:, None] * (x @ d.T) - v[:, None] * (x @ p.T) + (w @ x.T)[:, :, None]
    total = of_plan[:, None] + u[:, None] ** 2 * _dot(x, x)[:, None] + 2 * u[:, None] * mixed
    return np.maximum(total, 0.0)


def _dot(one: Floats, other: Floats) -> Floats:
    """(n,) inner products of the rows."""
    return np.einsum("nr,nr->n", one, other)
