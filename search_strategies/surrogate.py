"""Surrogate search: a model of what levels are worth, alone and in pairs, and climbs on its predictions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from diffes.errors import at_least
from diffes.spaces.genome import Origin
from diffes.spaces.initial import hybrid, sample_unseen
from diffes.spaces.plan import PlanSpace
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import Evaluation, Proposal, Strategy
from search_strategies.gaussian_process import Floats, Kernel, Model
from search_strategies.plan_view import PlanView

DP_UNITS = 2000  # units in which dynamic programming counts the budget, at most
PARENTS = 5  # fittest schedules from which a climb starts
STRANGERS = 2  # random schedules from which a climb starts
CLIMB = 10  # moves of a climb, at most
CURIOSITY = (0.0, 0.5, 1.0, 2.0)  # standard deviations added to the predicted mean, by schedule of a batch
THRIFT = 0.1  # price of a whole run's denoiser calls, in standard deviations of the ranks
NEWS = 0.02  # share of new evaluations that causes a new fit of the model; below 200 evaluations every batch does
MEMORY = 300  # number of fittest schedules that the model is fitted to


class Surrogate(Strategy):
    """Surrogate search for few denoiser calls: a Gaussian process over schedules, and climbs on its predictions.

    The worth of a schedule is modelled as a sum over stages, each a smooth function of its level, and over pairs of
    stages. A fit finds how much each stage counts and how fast it varies. The model is of ranks, not scores: fitness
    falls off steeply, and what matters is the order at the top.

    Each schedule of a batch is the best that a climb passed. Climbs start from the optimum of the sum over stages,
    found by dynamic programming (`solve`), from the fittest schedules known and from random ones. They move single
    levels between stages as long as the upper bound of the prediction rises. That bound is the mean for the first
    schedule of a batch and two standard deviations above it for the last. Among schedules of nearly equal bounds, it
    asks for one that shares the first stages with a measured one: it costs fewer denoiser calls.

    Of plans the model sees only how compute and calls are spread along the trajectory. Climbs on plans start from the
    fittest and from random ones and follow random mutations.

    Args:
        space: the feasible schedules.
        seed: the only source of randomness.
        initial: size of the hybrid first population, at least 2.
        batch: number of schedules per batch, at least 1.
    """

    asynchronous = True

    def __init__(self, space: SearchSpace, *, seed: int, initial: int = 8, batch: int = 4) -> None:
        super().__init__(space, seed=seed)
        self.initial = at_least("initial", initial, 2)
        self.batch = at_least("batch", batch, 1)
        self._rng = np.random.default_rng(seed)
        self._known: dict[tuple[int, ...], float] = {}
        self._prefixes: set[tuple[int, ...]] = set()
        self._view = PlanView(space) if isinstance(space, PlanSpace) else StageView(space)
        self._fitted_to = 0
        self._kernel = Kernel.prior(self._view.n_features, self._view.grid)

    def _ask(self) -> list[Proposal]:
        if not self._known:
            return [self.propose(levels) for levels in hybrid(self.space, self._rng, self.initial)]
        if len(set(self._known.values()) - {-math.inf}) < 2:
            return self._random(self.batch, [])
        ranked = sorted(self._known, key=lambda levels: self._known[levels], reverse=True)
        scores = ndtri((ranks_of([self._known[genome] for genome in ranked]) - 0.5) / len(ranked))[:MEMORY]
        levels = self._view.features(ranked[:MEMORY])
        if len(ranked) >= (1 + NEWS) * self._fitted_to:
            self._kernel, self._fitted_to = self._kernel.fitted(levels, scores), len(ranked)
        return self._promising(Model(self._kernel, levels, scores), ranked)

    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        for evaluation in evaluations:
            levels = evaluation.schedule.levels
            self._known[levels] = evaluation.fitness
            self._prefixes.update(state for state, _ in self._view.states(levels))

    def _random(self, n: int, chosen: Sequence[tuple[int, ...]]) -> list[Proposal]:
        """Draw up to n unseen schedules that are not among those chosen."""
        taken: set[tuple[int, ...]] = {*self._known, *chosen, *self._open}
        batch: list[Proposal] = []
        while len(batch) < n and (levels := sample_unseen(self.space, self._rng, taken)) is not None:
            taken.add(tuple(levels))
            batch.append(self.propose(levels, origin=Origin("random")))
        return batch

    @property
    def _open(self) -> list[tuple[int, ...]]:
        return [proposal.schedule.levels for proposal in self.pending]

    def _price(self, levels: Sequence[int]) -> float:
        """Return the share of a whole run's denoiser calls that measuring a schedule takes, given what is measured."""
        return sum(price for state, price in self._view.states(levels) if state not in self._prefixes)

    def _promising(self, model: Model, ranked: Sequence[tuple[int, ...]]) -> list[Proposal]:
        """Choose a batch of unseen schedules, from the one predicted best to the one that tells most."""
        batch: dict[tuple[int, ...], Proposal] = {}
        waiting = self._open
        taken = {*self._known, *waiting}
        for levels in waiting:
            features = self._view.features([levels])
            model = model.believing(features, float(model.predict(features)[0][0]))
        for _, curiosity in zip(range(self.batch), itertools.cycle(CURIOSITY), strict=False):
            passed = self._climb(model, ranked, curiosity)
            unseen = [levels for levels in passed if levels not in taken and levels not in batch]
            if not unseen:
                continue
            mean, deviation = model.predict(self._view.features(unseen))
            chosen = self._thrifty(unseen, mean + curiosity * deviation)
            best = unseen[chosen]
            batch[best] = self.propose(best, origin=passed[best])
            model = model.believing(self._view.features([best]), float(mean[chosen]))
        return [*batch.values(), *self._random(self.batch - len(batch), list(batch))]

    def _thrifty(self, genomes: Sequence[tuple[int, ...]], worth: Floats) -> int:
        """Return the index of the genome worth most after its price is taken off.

        Genomes too far behind the best to win are not priced.
        """
        top = int(np.argmax(worth))
        near = np.flatnonzero(worth >= worth[top] - THRIFT * self._price(genomes[top])).tolist()
        left = [worth[i] - THRIFT * self._price(genomes[i]) for i in near]
        return int(near[int(np.argmax(left))])

    def _climb(
        self, model: Model, ranked: Sequence[tuple[int, ...]], curiosity: float
    ) -> dict[tuple[int, ...], Origin]:
        """Return the feasible genomes that were passed on the climbs, and where each came from."""
        passed: dict[tuple[int, ...], Origin] = {}
        if isinstance(self._view, StageView):
            optimum = self.space.repair(solve(self.space, self._view.table(model)), self._rng)
            passed[tuple(optimum)] = Origin("dynamic programming")
        for _ in range(STRANGERS):
            passed.setdefault(tuple(self.space.sample(self._rng)), Origin("random"))
        here = list(dict.fromkeys([*passed, *ranked[:PARENTS]]))
        height: dict[tuple[int, ...], float] = {}
        for _ in range(CLIMB):
            around = [self._view.neighbours(levels, self._rng) for levels in here]
            new = list(dict.fromkeys(levels for levels in [*here, *itertools.chain(*around)] if levels not in height))
            if new:
                mean, deviation = model.predict(self._view.features(new))
                height.update(zip(new, mean + curiosity * deviation, strict=True))
            for levels, near in zip(here, around, strict=True):
                for moved in near:
                    passed.setdefault(moved, Origin("climb", (levels,)))
            tops = [max([levels, *near], key=height.__getitem__) for levels, near in zip(here, around, strict=True)]
            higher = list(dict.fromkeys(top for top, levels in zip(tops, here, strict=True) if top != levels))
            if not higher:
                break
            here = higher
        return passed


def ranks_of(fitness: Sequence[float]) -> Floats:
    """Return the ranks (n,) of fitness (n,), 1 the lowest; equals get their mean rank."""
    _, places, counts = np.unique(fitness, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[places]


class StageView:
    """View of schedules for the model: their features, which are near, and which denoiser calls they share.

    Args:
        space: the feasible schedules.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space

        self.grid = np.arange(space.max_level + 1) / max(space.max_level, 1)
        moves = list(itertools.permutations(space.visited, 2))
        self._moves = [np.array(stages, dtype=int) for stages in zip(*moves, strict=True)] or [np.array([], int)] * 2
        self._costs = np.array(space.level_costs) * np.array(space.steps)[:, None]  # (S, H + 1)
        self._gains = -np.diff(self._costs, axis=1, prepend=self._costs[:, :1])  # (S, H + 1) of the next denser level

    @property
    def n_features(self) -> int:
        """Number of features: one per visited stage."""
        return len(self.space.visited)

    def features(self, genomes: Sequence[Sequence[int]]) -> Floats:
        """Return the sparsity (n, V) of the visited stages."""
        return self.grid[np.array(genomes)[:, self.space.visited]]

    def neighbours(self, levels: tuple[int, ...], rng: np.random.Generator) -> list[tuple[int, ...]]:
        """Return the distinct feasible genomes that moving one level from one stage to another leads to."""
        found: dict[tuple[int, ...], None] = {}
        lowered, raised = self._moves
        here = np.array(levels)
        possible = (here[lowered] > 0) & (here[raised] < self.space.max_level)
        moved = np.tile(here, (int(possible.sum()), 1))
        rows = np.arange(len(moved))
        moved[rows, lowered[possible]] -= 1
        moved[rows, raised[possible]] += 1
        for genome, feasible in zip(moved.tolist(), self._feasible(moved), strict=True):
            found.setdefault(tuple(genome if feasible else self.space.repair(genome, rng)))
        found.pop(levels, None)
        return list(found)

    def _feasible(self, genomes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return `is_feasible` (n,) of genomes (n, S) whose levels are in [0, H], and 0 in stages not visited."""
        if self.space.budget is None:
            return np.ones(len(genomes), dtype=bool)
        stages = np.arange(self.space.n_stages)
        cost = self._costs[stages, genomes].sum(1)
        tight = cost[:, None] + self._gains[stages, genomes] > self.space.budget
        return (cost <= self.space.budget) & ((genomes == 0) | tight).all(1)

    def states(self, levels: Sequence[int]) -> list[tuple[tuple[int, ...], float]]:
        """Return what decides the state after each visited stage, and the share of a run's calls in the stage.

        Stages are in the order of sampling.
        """
        sampled = self.space.visited[::-1]
        path = [levels[s] for s in sampled]
        return [(tuple(path[: i + 1]), self.space.steps[s] / sum(self.space.steps)) for i, s in enumerate(sampled)]

    def table(self, model: Model) -> Floats:
        """Return the predicted worth (S, H + 1) of each level of each stage on its own."""
        top = self.space.max_level
        table = np.zeros((self.space.n_stages, top + 1))
        grid = np.repeat(np.arange(top + 1)[:, None] / max(top, 1), len(self.space.visited), axis=1)
        table[self.space.visited] = np.einsum("gnv,n->vg", model.kernel.alone(grid, model.levels), model.weights)
        return table


def solve(space: SearchSpace, table: Floats) -> list[int]:
    """Return the genome (S,) within the budget with the largest sum of `table[s, level]`, by dynamic programming.

    It is exact if the budget has no more than 2,000 units; finer costs are rounded up to as many.

    Args:
        space: the feasible schedules.
        table: (S, H + 1) worth of each level of each stage.
    """
    costs = np.array([[n * cost for cost in row] for n, row in zip(space.steps, space.level_costs, strict=True)])
    costs -= costs[:, -1:]  # all schedules pay this
    dense = int(costs[:, 0].sum())
    limit = dense if space.budget is None else space.budget - space.cost([space.max_level] * space.n_stages)
    unit = max(1.0, limit / DP_UNITS)
    costs, limit = np.ceil(costs / unit).astype(int), int(min(limit, dense) / unit)
    value = np.zeros(limit + 1)
    choices = []
    for s in range(space.n_stages):
        levels = range(space.max_level + 1) if space.steps[s] else range(1)
        worth = np.full((len(levels), limit + 1), -np.inf)
        for level in levels:
            cost = costs[s, level]
            if cost <= limit:
                worth[level, cost:] = value[: limit + 1 - cost] + table[s, level]
        choices.append(worth.argmax(0))
        value = worth.max(0)
    left, genome = limit, [0] * space.n_stages
    for s in reversed(range(space.n_stages)):
        genome[s] = int(choices[s][left])
        left -= costs[s, genome[s]]
    return genome
