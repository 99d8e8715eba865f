"""The best plan of every cost, by a dynamic programme that carries the latents of its plans along."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from diffes.errors import at_least
from diffes.search.frontier import Floats, Forecast, called, counted, genomes, in_turn, undominated

Ints = NDArray[np.int_]
CLASSES = 3  # partial plans that are told apart by how many calls ago one computed everything
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
        reusing: (L,) rising levels that reuse what an earlier call computed; `data` has NaN for them.
        gaps: (G,) rising, how many nodes before a call that one lay, where it was measured.
        reused: (N, L, G, R) what is predicted then.
    """

    states: Floats
    data: Floats
    signals: Floats
    noises: Floats
    reaction: Floats
    costs: Floats
    second: bool
    reusing: Ints = field(default_factory=lambda: np.zeros(0, dtype=int))
    gaps: Ints = field(default_factory=lambda: np.zeros(0, dtype=int))
    reused: Floats = field(default_factory=lambda: np.zeros((0, 0, 0, 0)))

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
        (error,) = self.errors([levels]).tolist()
        return Forecast(tuple(levels), float(sum(self.costs[i, k] for i, k in path)), error)

    def errors(self, plans: Sequence[Sequence[int]], caution: float = 0.0) -> Floats:
        """Forecasts (n,) of the error of plans (N,), and a share of what their jumps do alone.

        A forecast may be small because large errors cancel each other, which is not to be trusted far: an estimate for
        the case that they do not is the sum of squares of each jump's own error, as it has grown at the end.

        Args:
            plans: the cleanest node first.
            caution: weight of that sum, at least 0.

        Raises:
            DiffesError: as `predict`.
        """
        paths = [called(plan, *self.costs.shape) for plan in plans]
        longest, n = max(map(len, paths)), len(self.costs)
        nodes, levels = np.full((longest + 1, len(plans)), n), np.zeros((longest, len(plans)), dtype=int)
        for column, path in enumerate(paths):
            nodes[: len(path), column], levels[: len(path), column] = zip(*path, strict=True)
        alone = np.square(self.states[nodes[0]] - self.states[0]).sum(1)
        before, computed = np.full((2, len(plans)), -1)
        at, clean, dense = np.tile(self.states[0], (3, len(plans), 1))  # then the clean latents predicted last
        for i, j, k in zip(nodes, nodes[1:], levels, strict=False):
            on = np.flatnonzero(i < n)
            i, j, k = i[on], j[on], k[on]
            x = self.data_at(i, k, computed[on])
            new = x + self.reaction[i, None] * (at[on] - self.states[i])
            reach = self.reach(i, j, before[on])
            off = self.step(i, j, self.states[i], x, reach, dense[on]) - self.states[j]
            ratio = self.noises[j] / self.noises[i]
            grows = ratio + (self.signals[j] - self.signals[i] * ratio) * (1 + reach) * self.reaction[i]
            alone[on] = grows**2 * alone[on] + np.square(off).sum(1)
            at[on], clean[on], dense[on] = self.step(i, j, at[on], new, reach, clean[on]), new, self.data[i, 0]
            before[on] = i
            computed[on] = np.where(np.isin(k, self.reusing), computed[on], self.packed(i, k))
        return np.square(at - self.states[-1]).sum(1) + caution * alone

    def packed(self, i: int | Ints, k: int | Ints) -> int | Ints:
        """A call as one number, `node * K + level`."""
        return i * self.costs.shape[1] + k

    def data_at(self, i: Ints, k: Ints, computed: Ints) -> Floats:
        """Clean latents (C, R) predicted at the dense run's latents at nodes i, levels k.

        What reuses depends on how far back the last call lay that computed everything: between the gaps that were
        measured, and none, it is interpolated. If that call was thin, what it predicted wrong is taken over by as much
        as is not computed again.

        Args:
            i: (C,).
            k: (C,).
            computed: (C,) those calls, `packed`; not looked at where nothing is reused.
        """
        found = self.data[i, k]
        again = np.isin(k, self.reusing)
        if again.any():
            node, level = i[again], k[again]
            source, thin = np.divmod(computed[again], self.costs.shape[1])
            place = np.interp(node - source, [0, *self.gaps], np.arange(len(self.gaps) + 1))
            low, row = np.minimum(place.astype(int), len(self.gaps) - 1), np.searchsorted(self.reusing, level)
            share = (place - low)[:, None]
            nearer = np.where(low[:, None] > 0, self.reused[node, row, low - 1], self.data[node, 0])
            taken = np.maximum(1 - self.costs[node, level] / self.costs[node, 0], 0.0)
            wrong = self.data[source, thin] - self.data[source, 0]
            found[again] = (1 - share) * nearer + share * self.reused[node, row, low] + taken[:, None] * wrong
        return found

    def reach(self, i: int | Ints, j: int | Ints, before: int | Ints) -> Floats:
        """By how much of its change since the call before, at another node, the solver extends a prediction at node i
        on the way to node j; nothing after the first call (-1) and on the last step.

        Source: diffusers' `DPMSolverMultistepScheduler`, midpoint, `final_sigmas_type="zero"`.
        """
        n, logs = len(self.reaction), self.logs
        extends = self.second & (np.asarray(before) >= 0) & (np.asarray(j) < n)
        return np.where(extends, 0.5 * (logs[j] - logs[i]) / np.where(extends, logs[i] - logs[before], 1.0), 0.0)

    def step(self, i: int | Ints, j: int | Ints, at: Floats, clean: Floats, reach: Floats, before: Floats) -> Floats:
        """The latents (..., R) at node j, from those at node i, what is predicted there, and what was before."""
        ratio = np.asarray(self.noises[j] / self.noises[i])[..., None]
        gain = np.asarray(self.signals[j])[..., None] - np.asarray(self.signals[i])[..., None] * ratio
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
        Forecast(genome, float(sum(run.costs[i, k] for i, k in called(genome, *run.costs.shape))), error)
        for error, genome in genomes(value, origin, levels, units, run.costs.shape[1])
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
    found = dict.fromkeys(forecast.levels for forecast in in_turn(fronts))
    return [run.predict(levels) for levels in itertools.islice(found, count)]


@dataclass(frozen=True)
class _Partial:
    """The best partial plans that reach each node, by the units that they spent.

    Where levels reuse, one is kept for each number of calls since the last one that computed everything, up to CLASSES:
    what comes after depends on it. A row is a node and such a class.

    Args:
        value: (rows, limit + 1) error of a run that would end there from the dense run; infinite where there is none.
        origin: (rows, limit + 1) `row * L + level` of the call before; -1 at a start.
        computed: (rows, limit + 1) the last call that computed everything, `packed`; -1 at a start.
        at: (rows, limit + 1, R) latents.
    """

    value: Floats
    origin: Ints
    computed: Ints
    at: Floats

    @classmethod
    def none(cls, rows: int, limit: int, width: int) -> _Partial:
        shape = rows, limit + 1
        return cls(np.full(shape, np.inf), np.full(shape, -1), np.full(shape, -1), np.zeros((*shape, width)))


def _programme(run: Trajectory, levels: Sequence[int], units: Ints, limit: int) -> tuple[Floats, Ints]:
    """Error (classes, limit + 1) of the whole plans that are found for so many units, and how they are come by.

    Args:
        run: nodes, levels and what happens at them.
        levels: (L,) that are allowed.
        units: (N, L) of calls.
        limit: units that may be spent.

    Returns:
        The errors, and the `origin` of `_Partial`.
    """
    n, width = units.shape
    known = np.asarray(levels)
    reusing = np.flatnonzero(np.isin(known, run.reusing))
    fresh = np.flatnonzero(~np.isin(known, run.reusing))
    classes = CLASSES if len(reusing) else 1
    best = _Partial.none((n + 1) * classes, limit, run.states.shape[1])
    best.value[: n * classes : classes, 0] = np.square(run.states[:-1] - run.states[0]).sum(1)
    best.at[: n * classes : classes, 0] = run.states[0]

    def last(row: Ints, spent: Ints) -> tuple[Ints, Ints, Floats]:
        """Row of the last call before a row, -1 at a start; units spent before it; clean latents it predicted."""
        packed = best.origin[row, spent]
        before, level = packed // width, packed % width
        node = before // classes
        left = np.where(packed < 0, 0, spent - units[node, level])
        clean = run.data_at(node, known[level], best.computed[before, left])
        clean = clean + run.reaction[node, None] * (best.at[before, left] - run.states[node])
        return before, left, np.where(packed[:, None] < 0, 0.0, clean)

    def enter(row: int, level: int, spent: Ints, errors: Floats, group: int, computed: Ints) -> None:
        """Goes on from a row at a level to all later nodes (J,), with errors (J, C), where that is better."""
        cost = units[row // classes, level]
        paid = spent + cost <= limit
        rows = np.arange((row // classes + 1) * classes + group, len(best.value), classes)
        new, old = errors[:, paid], best.value[rows][:, spent[paid] + cost]
        node, column = np.nonzero(new < old)
        to = rows[node], spent[paid][column] + cost
        best.value[to] = new[node, column]
        best.origin[to] = row * width + level
        best.computed[to] = computed[paid][column]

    for row in range(n * classes):
        i, group = divmod(row, classes)
        spent = np.flatnonzero(np.isfinite(best.value[row]))
        before, left, clean = last(np.full(len(spent), row), spent)
        begun = before >= 0
        earlier, _, past = last(before[begun], left[begun])
        node = before // classes
        reach = run.reach(node[begun], i, earlier // classes)
        moved = run.step(node[begun], i, best.at[before, left][begun], clean[begun], reach, past)
        best.at[row, spent[begun]] = moved
        at, computed = best.at[row, spent], best.computed[row, spent]
        errors = _errors(run, i, run.data[i, known[fresh], None], at, node, clean)
        for column, level in enumerate(fresh.tolist()):
            computing = np.full(len(spent), run.packed(i, known[level]))
            enter(row, level, spent, errors[:, column], 0, computing)
        some = np.flatnonzero(computed >= 0)
        for level in reusing.tolist() if len(some) else ():
            x = run.data_at(np.full(len(some), i), np.full(len(some), known[level]), computed[some])
            errors = _errors(run, i, x[None], at[some], node[some], clean[some])
            enter(row, level, spent[some], errors[:, 0], min(group + 1, classes - 1), computed[some])
    return best.value[n * classes :], best.origin


def _errors(run: Trajectory, i: int, x: Floats, at: Floats, before: Ints, clean: Floats) -> Floats:
    """(N - i, L, C) mean square deviation at each later node and the end, after a call at node i at each level.

    With d the deviation now, p the prediction before and x that of the call, a step leaves a d + u x - v p + w, where
    a, u, v depend on where it goes and w is constant: only their inner products are needed, none of the sums.

    Args:
        run: the dense run.
        i: the node.
        x: (L, C or 1, R) what is predicted at the dense latents.
        at: (C, R) latents of partial plans at node i.
        before: (C,) node of the call before; -1 if there is none.
        clean: (C, R) what that predicted.
    """
    after = np.arange(i + 1, len(run.states))
    ratio = run.noises[after] / run.noises[i]
    gain = (run.signals[after] - run.signals[i] * ratio)[:, None]
    v = gain * run.reach(i, after[:, None], before)
    u = gain + v
    d, p, w = at - run.states[i], clean, ratio[:, None] * run.states[i] - run.states[after]
    a = ratio[:, None] + u * run.reaction[i]
    of_plan = a**2 * _dot(d, d) + v**2 * _dot(p, p) - 2 * a * v * _dot(d, p)
    of_plan += _dot(w, w)[:, None] + 2 * (a * (w @ d.T) - v * (w @ p.T))
    one = x.shape[1] == 1
    along = [x[:, 0] @ each.T if one else np.einsum("lcr,cr->lc", x, each) for each in (d, p)]
    mixed = a[:, None] * along[0] - v[:, None] * along[1] + np.tensordot(w, x, (1, 2))
    total = of_plan[:, None] + u[:, None] ** 2 * np.square(x).sum(2) + 2 * u[:, None] * mixed
    return np.maximum(total, 0.0)


def _dot(one: Floats, other: Floats) -> Floats:
    """(n,) inner products of the rows."""
    return np.einsum("nr,nr->n", one, other)
