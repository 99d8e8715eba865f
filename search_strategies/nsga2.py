"""NSGA-II: the whole front of fitness against cost in one search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from deap import base, tools

from diffes.errors import DiffesError, at_least
from diffes.spaces.genome import Genome
from diffes.spaces.initial import hybrid
from diffes.spaces.operators import confined
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import Evaluation, Proposal, Strategy
from diffes.spaces.variation import make_toolbox, vary


class TwoFitness(base.Fitness):  # type: ignore[misc]  # DEAP has no type hints
    """Fitness, higher is better, and cost, lower is better."""

    weights = (1.0, -1.0)


class Nsga2(Strategy):
    """Population spread along the front of fitness and cost; the budget only picks the result from it.

    It asks for schedules of all costs. The result of the search is the best within the budget; `SearchResult.front` has
    the whole front.

    Args:
        space: the feasible schedules; its costs are the second objective.
        seed: the only source of randomness.
        mu: size of the population, at least 4.
        lam: offspring per generation, at least 1.
        mutation: a registered mutation or one of DEAP's, with options after a colon; None takes the default of the
            space. Half of the offspring also change their cost, by `level_step`.
        crossover: a registered crossover or one of DEAP's, likewise.
        crossover_rate: probability that an offspring has two parents, in [0, 1].

    Source: Deb et al. 2002, by DEAP's `selNSGA2` and `selTournamentDCD`.
    """

    explores = True
    operators = ("mutation", "crossover")

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        mu: int = 24,
        lam: int = 16,
        mutation: str | None = None,
        crossover: str | None = None,
        crossover_rate: float = 0.5,
    ) -> None:
        super().__init__(space, seed=seed)
        self.mu = at_least("mu", mu, 4)
        self.lam = at_least("lam", lam, 1)
        if not 0 <= crossover_rate <= 1:
            raise DiffesError(f"crossover_rate must be in [0, 1], got {crossover_rate}")
        self._cxpb = crossover_rate
        self._rng = np.random.default_rng(seed)
        self._free = space.without_budget()
        self._toolbox = make_toolbox(self._free, self._rng, mutate=mutation, mate=crossover)
        self._toolbox.register("shift", self._toolbox.mutate)
        self._toolbox.register("step", make_toolbox(self._free, self._rng, mutate="level_step").mutate)
        self._toolbox.register("mutate", self._mutate)
        self._population: list[Genome] = []
        self._seen: set[tuple[int, ...]] = set()

    def _ask(self) -> list[Proposal]:
        batch = self._offspring() if self._population else self._first()
        self._seen.update(map(tuple, batch))
        return [self.propose(genome, origin=genome.origin) for genome in batch]

    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        for evaluation in evaluations:
            genome = Genome(evaluation.schedule.levels)
            genome.fitness = TwoFitness((evaluation.fitness, self.space.cost(genome)))
            self._population.append(genome)
        self._population = tools.selNSGA2(self._population, min(self.mu, len(self._population)))

    def _first(self) -> list[Genome]:
        """Build the first population: constants of all levels or numbers of calls, then the budget's hybrid one."""
        constant = self.space.constants()
        distinct = dict.fromkeys(tuple(levels) for levels in [*constant, *hybrid(self.space, self._rng, self.mu)])
        return [Genome(levels) for levels in distinct][: max(self.mu, len(constant))]

    def _offspring(self) -> list[Genome]:
        """Make lambda distinct unseen genomes (S,) of parents that won a tournament by domination, then by crowding."""
        parents = self._population
        if len(parents) >= 4:
            with confined(self._rng):
                parents = tools.selTournamentDCD(parents, len(parents) // 4 * 4)
        return vary(parents, self._toolbox, self.lam, space=self._free, rng=self._rng, seen=self._seen, cxpb=self._cxpb)

    def _mutate(self, genome: Genome) -> tuple[Genome]:
        """Apply the mutation and, half of the time, a step that changes the cost."""
        (genome,) = self._toolbox.shift(genome)
        if self._rng.random() < 0.5:
            (genome,) = self._toolbox.step(genome)
        return (genome,)
