"""Search of the Diff-ES paper: an elitist (mu + lambda) evolution by level-switch mutation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffes.errors import DiffesError, at_least
from diffes.spaces.genome import Genome
from diffes.spaces.initial import hybrid
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import Evaluation, Proposal, Strategy
from diffes.spaces.variation import make_toolbox, vary


class Evolution(Strategy):
    """Elitist evolution: it keeps the mu fittest of parents and offspring, and never asks for a schedule twice.

    Args:
        space: the feasible schedules.
        seed: the only source of randomness.
        mu: survivors per generation, at least 1.
        lam: lambda, offspring per generation, at least 1.
        initial: size of the hybrid first population, at least 1.
        mutation: a registered mutation or one of DEAP's, with options after a colon:
            "level_switch:max_moves=3,max_levels=1", "deap.mutUniformInt:indpb=0.2". None takes the default of the
            space: "level_switch" as in the paper, "plan_move" for plans.
        crossover: a registered crossover or one of DEAP's, likewise. None goes without, as in the paper.
        crossover_rate: probability that an offspring has two parents, in [0, 1], if there is a crossover.

    Source: Diff-ES, with mu = 4, lambda = 16, and 50 generations on DiT or 100 on SDXL: 800 and more evaluations. The
    defaults here are for searches of about a hundred evaluations, where large generations would be too few. An
    offspring that was asked before is mutated until it is new, so that no evaluation is spent twice. The same in plain
    DEAP is `eaMuPlusLambda` on `bench.toolbox()`.
    """

    operators = ("mutation", "crossover")
    asynchronous = True

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        mu: int = 2,
        lam: int = 4,
        initial: int = 16,
        mutation: str | None = None,
        crossover: str | None = None,
        crossover_rate: float = 0.5,
    ) -> None:
        super().__init__(space, seed=seed)
        self.mu = at_least("mu", mu, 1)
        self.lam = at_least("lam", lam, 1)
        self.initial = at_least("initial", initial, 1)
        if not 0 <= crossover_rate <= 1:
            raise DiffesError(f"crossover_rate must be in [0, 1], got {crossover_rate}")
        self._cxpb = crossover_rate if crossover is not None else 0.0
        self._rng = np.random.default_rng(seed)
        self._toolbox = make_toolbox(space, self._rng, mutate=mutation, mate=crossover)
        self._survivors: list[Genome] = []
        self._seen: set[tuple[int, ...]] = set()

    def _ask(self) -> list[Proposal]:
        if self._survivors:
            batch = vary(
                self._survivors, self._toolbox, self.lam, space=self.space, rng=self._rng, seen=self._seen,
                cxpb=self._cxpb,
            )  # fmt: skip
        else:
            batch = [Genome(levels) for levels in hybrid(self.space, self._rng, self.initial)]
        self._seen.update(map(tuple, batch))
        return [self.propose(genome, origin=genome.origin) for genome in batch]

    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        offspring = [Genome(evaluation.schedule.levels, evaluation.fitness) for evaluation in evaluations]
        self._seen.update(map(tuple, offspring))  # maybe of an earlier process
        self._survivors = self._toolbox.select([*self._survivors, *offspring], self.mu)
