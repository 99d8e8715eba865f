"""NSGA-II: the whole front of fitness against cost in one search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from deap import base, tools

from diffes.errors import DiffesError, at_least
from diffes.space import SearchSpace
from diffes.strategy import Evaluation, Origin, Strategy
from search_strategies.initial import hybrid, sample_unseen
from search_strategies.operators import Genome, make_toolbox

MUTATION_TRIES = 20


class TwoFitness(base.Fitness):  # type: ignore[misc]  # DEAP has no type hints
    """Fitness, higher is better, and cost, lower is better."""

    weights = (1.0, -1.0)


class Nsga2(Strategy):
    """Keeps a population spread along the front of fitness and cost; the budget only picks the result from it.

    It asks for schedules of all costs. The result of the search is the best of those within the budget; the others are
    the front (`SearchResult.front`).

    Args:
        space: the feasible schedules; its costs are the second objective.
        seed: the only source of randomness.
        mu: size of the population, at least 4.
        lam: offspring of a generation, at least 1.
        mutation: a registered mutation, with options after a colon; half of the offspring also change their cost, by
            `level_step`.
        crossover: a registered crossover, likewise.
        crossover_rate: how likely an offspring has two parents, in [0, 1].

    Source: Deb et al. 2002, in DEAP's `selNSGA2` and `selTournamentDCD`.
    """

    explores = True

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        mu: int = 24,
        lam: int = 16,
        mutation: str = "level_switch",
        crossover: str = "level_exchange",
        crossover_rate: float = 0.5,
    ) -> None:
        super().__init__(space, seed=seed)
        self.mu = at_least("mu", mu, 4)
        self.lam = at_least("lam", lam, 1)
        if not 0 <= crossover_rate <= 1:
            raise DiffesError(f"crossover_rate must be in [0, 1], got {crossover_rate}")
        self.mutation = mutation
        self.crossover = crossover
        self.crossover_rate = crossover_rate
        self._rng = np.random.default_rng(seed)
        self._free = space.without_budget()
        self._toolbox = make_toolbox(self._free, self._rng, mutate=mutation, mate=crossover)
        self._step = make_toolbox(self._free, self._rng, mutate="level_step").mutate
        self._population: list[Genome] = []
        self._seen: set[tuple[int, ...]] = set()

    def _ask(self) -> list[list[int]]:
        batch = self._offspring() if self._population else self._first()
        self._seen.update(map(tuple, batch))
        return batch

    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        for evaluation in evaluations:
            genome = Genome(evaluation.schedule.levels)
            genome.fitness = TwoFitness((evaluation.fitness, self.space.cost(genome)))
            self._population.append(genome)
        self._population = tools.selNSGA2(self._population, min(self.mu, len(self._population)))

    def _first(self) -> list[list[int]]:
        """A constant schedule of every level, then the hybrid first population of the budget."""
        constant = [[level if n else 0 for n in self.space.steps] for level in range(self.space.max_level + 1)]
        distinct = dict.fromkeys(tuple(levels) for levels in [*constant, *hybrid(self.space, self._rng, self.mu)])
        return [list(levels) for levels in distinct][: max(self.mu, len(constant))]

    def _offspring(self) -> list[list[int]]:
        batch: dict[tuple[int, ...], None] = {}
        while len(batch) < self.lam:
            taken = self._seen | batch.keys()
            one, other = (self._tournament() for _ in range(2))
            child, parents, operators = self._toolbox.clone(one), [one], [self.mutation]
            if self._rng.random() < self.crossover_rate:
                child, _ = self._toolbox.mate(child, self._toolbox.clone(other))
                parents.append(other)
                operators.insert(0, self.crossover)
            for _ in range(MUTATION_TRIES):
                (child,) = self._toolbox.mutate(child)
                if self._rng.random() < 0.5:
                    (child,) = self._step(child)
                if tuple(child) not in taken:
                    break
            else:
                sample = sample_unseen(self._free, self._rng, taken)
                if sample is None:
                    break
                child, parents, operators = Genome(sample), [], ["random"]
            levels = tuple(int(level) for level in child)
            self.origins[levels] = Origin(" + ".join(operators), tuple(tuple(parent) for parent in parents))
            batch[levels] = None
        return [list(levels) for levels in batch]

    def _tournament(self) -> Genome:
        """The better of two random members: by domination, then by how lonely it is on the front."""
        i, j = self._rng.integers(len(self._population), size=2)
        one, other = self._population[int(i)], self._population[int(j)]
        if other.fitness.dominates(one.fitness):
            return other
        if one.fitness.dominates(other.fitness) or one.fitness.crowding_dist >= other.fitness.crowding_dist:
            return one
        return other
