"""Our own search: a model of what levels cost, alone and in pairs, and a climb to where it promises most."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.stats import norm, rankdata

from diffes.errors import at_least
from diffes.search.genome import Origin
from diffes.search.initial import hybrid, sample_unseen
from diffes.search.plan import PlanSpace
from diffes.search.space import SearchSpace
from diffes.search.strategy import Evaluation, Proposal, Strategy
from search_strategies.plan_view import PlanView

Floats = NDArray[np.float64]
DP_UNITS = 2000  # costs are counted in at most so many units of the budget when it is solved
PARENTS = 5  # fittest schedules from which a climb starts
STRANGERS = 2  # random schedules from which a climb starts
CLIMB = 10  # moves of a climb
CURIOSITY = (0.0, 0.5, 1.0, 2.0)  # standard deviations added to what is believed, for each schedule of a batch
THRIFT = 0.1  # worth of a whole run's denoiser calls, in standard deviations of the ranks
MEMORY = 300  # fittest schedules that the model is fitted to


class Surrogate(Strategy):
    """Few denoiser calls: a Gaussian process over schedules, and climbs on what it believes.

    What a schedule is worth is modelled as a sum over stages, each a smooth function of its level, and over pairs of
    stages; how much each stage counts and how fast it varies is fitted. Ranks are modelled, not scores: fitness falls
    off steeply, and what matters is the order at the top. Each schedule of a batch is the best that a climb passed:
    from the optimum of the sum over stages, found exactly by dynamic programming, from the fittest schedules known and
    from random ones, it moves single levels between stages as long as the upper bound rises of what the model believes.
    That bound is the mean for the first schedule of a batch and two standard deviations above it for the last. Of
    equals the one is asked that shares the first stages with one that was measured: it costs fewer denoiser calls.

    Plans are seen coarsely, by the compute and the calls along the trajectory; climbs on them begin with the fittest
    and with random ones and follow random mutations.

    Args:
        space: the feasible schedules.
        seed: the only source of randomness.
        initial: size of the hybrid first population, at least 2.
        batch: schedules asked at once, at least 1.
    """

    def __init__(self, space: SearchSpace, *, seed: int, initial: int = 8, batch: int = 4) -> None:
        super().__init__(space, seed=seed)
        self.initial = at_least("initial", initial, 2)
        self.batch = at_least("batch", batch, 1)
        self._rng = np.random.default_rng(seed)
        self._known: dict[tuple[int, ...], float] = {}
        self._prefixes: set[tuple[int, ...]] = set()
        self._view = PlanView(space) if isinstance(space, PlanSpace) else StageView(space)
        self._kernel = _Kernel.prior(self._view.n_features)

    def _ask(self) -> list[Proposal]:
        if not self._known:
            return [self.propose(levels) for levels in hybrid(self.space, self._rng, self.initial)]
        if len(set(self._known.values()) - {-math.inf}) < 2:
            return self._random(self.batch, [])
        ranked = sorted(self._known, key=lambda levels: self._known[levels], reverse=True)
        ranks = rankdata([self._known[genome] for genome in ranked])
        levels, scores = self._view.features(ranked), norm.ppf((ranks - 0.5) / len(ranked))
        self._kernel = self._kernel.fitted(levels[:MEMORY], scores[:MEMORY])
        return self._promising(_Model(self._kernel, levels[:MEMORY], scores[:MEMORY]), ranked)

    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        for evaluation in evaluations:
            levels = evaluation.schedule.levels
            self._known[levels] = evaluation.fitness
            self._prefixes.update(state for state, _ in self._view.states(levels))

    def _random(self, n: int, chosen: Sequence[tuple[int, ...]]) -> list[Proposal]:
        """Up to n unseen schedules that are not among those chosen."""
        taken: set[tuple[int, ...]] = {*self._known, *chosen}
        batch: list[Proposal] = []
        while len(batch) < n and (levels := sample_unseen(self.space, self._rng, taken)) is not None:
            taken.add(tuple(levels))
            batch.append(self.propose(levels, origin=Origin("random")))
        return batch

    def _price(self, levels: Sequence[int]) -> float:
        """Fraction of a whole run's denoiser calls that measuring a schedule takes, given what was measured before."""
        return sum(price for state, price in self._view.states(levels) if state not in self._prefixes)

    def _promising(self, model: _Model, ranked: Sequence[tuple[int, ...]]) -> list[Proposal]:
        """The batch of unseen schedules, from the one that is believed best to the one that tells most."""
        batch: dict[tuple[int, ...], Proposal] = {}
        for _, curiosity in zip(range(self.batch), itertools.cycle(CURIOSITY), strict=False):
            passed = self._climb(model, ranked, curiosity)
            unseen = [levels for levels in passed if levels not in self._known and levels not in batch]
            if not unseen:
                continue
            mean, deviation = model.predict(self._view.features(unseen))
            prices = np.array([self._price(levels) for levels in unseen])
            chosen = int(np.argmax(mean + curiosity * deviation - THRIFT * prices))
            best = unseen[chosen]
            batch[best] = self.propose(best, origin=passed[best])
            model = model.believing(self._view.features([best]), float(mean[chosen]))
        return [*batch.values(), *self._random(self.batch - len(batch), list(batch))]

    def _climb(
        self, model: _Model, ranked: Sequence[tuple[int, ...]], curiosity: float
    ) -> dict[tuple[int, ...], Origin]:
        """Feasible genomes that were passed on the way up, and from where."""
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


class StageView:
    """What the model is told of a schedule of stages, which schedules are near, and which denoiser calls they share.

    Args:
        space: the feasible schedules.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space

    @property
    def n_features(self) -> int:
        """One a visited stage."""
        return len(self.space.visited)

    def features(self, genomes: Sequence[Sequence[int]]) -> Floats:
        """Sparsity (n, V) of the visited stages."""
        return np.array(genomes, dtype=float)[:, self.space.visited] / max(self.space.max_level, 1)

    def neighbours(self, levels: tuple[int, ...], rng: np.random.Generator) -> list[tuple[int, ...]]:
        """Distinct feasible genomes that one level moved from one stage to another leads to."""
        found: dict[tuple[int, ...], None] = {}
        for i, j in itertools.permutations(self.space.visited, 2):
            if levels[i] == 0 or levels[j] == self.space.max_level:
                continue
            moved = list(levels)
            moved[i] -= 1
            moved[j] += 1
            if not self.space.is_feasible(moved):
                moved = self.space.repair(moved, rng)
            found.setdefault(tuple(moved))
        found.pop(levels, None)
        return list(found)

    def states(self, levels: Sequence[int]) -> list[tuple[tuple[int, ...], float]]:
        """What decides the state after each visited stage, in the order of sampling, and its share of a run's calls."""
        sampled = self.space.visited[::-1]
        path = [levels[s] for s in sampled]
        return [(tuple(path[: i + 1]), self.space.steps[s] / sum(self.space.steps)) for i, s in enumerate(sampled)]

    def table(self, model: _Model) -> Floats:
        """(S, H + 1) what the model believes each level of each stage to be worth on its own."""
        top = self.space.max_level
        table = np.zeros((self.space.n_stages, top + 1))
        grid = np.repeat(np.arange(top + 1)[:, None] / max(top, 1), len(self.space.visited), axis=1)
        table[self.space.visited] = np.einsum("gnv,n->vg", model.kernel.alone(grid, model.levels), model.weights)
        return table


def solve(space: SearchSpace, table: Floats) -> list[int]:
    """The genome (S,) within the budget with the largest sum of `table[s, level]`, by dynamic programming.

    Exact as long as the budget has no more than 2,000 units; finer costs are rounded up to as many.

    Args:
        space: the feasible schedules.
        table: (S, H + 1) worth of each level of each stage.
    """
    costs = np.array([[n * cost for cost in row] for n, row in zip(space.steps, space.level_costs, strict=True)])
    costs -= costs[:, -1:]  # what all schedules pay
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


@dataclass(frozen=True)
class _Kernel:
    """Covariance of schedules: a function of each visited stage, of each pair of them, and noise.

    Args:
        parameters: (2 V + 2,) natural logarithms: how far each stage's function reaches, as sparsity; how much each
            stage counts; how much pairs count; variance of what neither explains.
    """

    parameters: Floats

    @classmethod
    def prior(cls, n: int) -> _Kernel:
        """What is assumed of n stages before anything was measured."""
        return cls(np.log([0.5] * n + [0.1] * n + [0.4, 0.01]))

    def alone(self, a: Floats, b: Floats) -> Floats:
        """(n, m, V) covariances of each stage's own function; sparsities (n, V) and (m, V)."""
        n = a.shape[1]
        reach, weight = np.exp(self.parameters[:n]), np.exp(self.parameters[n : 2 * n])
        return weight * np.exp(-(((a[:, None] - b[None]) / reach) ** 2) / 2)

    def __call__(self, a: Floats, b: Floats) -> Floats:
        return self._summed(self.alone(a, b))

    @property
    def pairs(self) -> float:
        return float(np.exp(self.parameters[-2]))

    @property
    def noise(self) -> float:
        return float(np.exp(self.parameters[-1])) + 1e-6

    @property
    def variance(self) -> float:
        """Of the fitness of any schedule, noise left out."""
        n = len(self.parameters) // 2 - 1
        return float(self._summed(np.exp(self.parameters[n : 2 * n])))

    def _summed(self, alone: Floats) -> Floats:
        total = alone.sum(-1)
        return total + self.pairs * (total**2 - (alone**2).sum(-1)) / 2

    def fitted(self, levels: Floats, scores: Floats) -> _Kernel:
        """The kernel under which scores (n,) at sparsities (n, V) are likeliest, given the prior; from here on."""
        n = levels.shape[1]
        prior = self.prior(n).parameters
        squares = (levels[:, None] - levels[None]) ** 2

        def loss(parameters: Floats) -> tuple[float, Floats]:
            kernel = _Kernel(parameters)
            alone = kernel.alone(levels, levels)
            factor = np.linalg.cholesky(kernel._summed(alone) + kernel.noise * np.eye(len(levels)))
            inverse = cho_solve((factor, True), np.eye(len(levels)))
            weights = inverse @ scores
            total = alone.sum(-1)
            outer = (inverse - np.outer(weights, weights)) / 2  # of the loss by the covariance
            by_stage = outer[:, :, None] * (1 + kernel.pairs * (total[:, :, None] - alone)) * alone
            gradient = np.array([
                *(by_stage * squares).sum((0, 1)) / np.exp(2 * parameters[:n]),
                *by_stage.sum((0, 1)),
                kernel.pairs * (outer * (total**2 - (alone**2).sum(-1)) / 2).sum(),
                math.exp(parameters[-1]) * np.trace(outer),
            ])  # fmt: skip
            likelihood = -scores @ weights / 2 - np.log(np.diag(factor)).sum()
            far = parameters - prior
            return float(far @ far / 2 - likelihood), gradient + far

        bounds = [(value - 4, value + 4) for value in prior]
        found = minimize(loss, self.parameters, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 20})
        return _Kernel(np.asarray(found.x))


class _Model:
    """A Gaussian process conditioned on measured schedules.

    Args:
        kernel: the covariance.
        levels: sparsities (n, V).
        scores: (n,), around 0 with a variance of 1.
    """

    def __init__(self, kernel: _Kernel, levels: Floats, scores: Floats) -> None:
        self.kernel, self.levels, self.scores = kernel, levels, scores
        self._factor = np.linalg.cholesky(kernel(levels, levels) + kernel.noise * np.eye(len(levels)))
        self.weights = cho_solve((self._factor, True), scores)

    def predict(self, levels: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation (m,) of the scores at sparsities (m, V), noise left out."""
        across = self.kernel(self.levels, levels)
        known = solve_triangular(self._factor, across, lower=True)
        variance = np.maximum(self.kernel.variance - (known**2).sum(0), 1e-10)
        return across.T @ self.weights, np.sqrt(variance)

    def believing(self, levels: Floats, score: float) -> _Model:
        """The model as if a score had been measured at sparsities (1, V)."""
        return _Model(self.kernel, np.vstack([self.levels, levels]), np.append(self.scores, score))
