"""The paper's search: an elitist (mu + lambda) evolution by level-switch mutation."""

from __future__ import annotations

from collections.abc import Sequence, Set

import numpy as np

from diffes.errors import DiffesError, at_least
from diffes.space import SearchSpace
from diffes.strategy import Evaluation, Origin, Strategy
from search_strategies.initial import hybrid, sample_unseen
from search_strategies.operators import Genome, make_toolbox

MUTATION_TRIES = 20


class Evolution(Strategy):
    """Keeps the mu fittest of parents and offspring; each generation asks for lambda schedules never seen before.

    Args:
        space: the feasible schedules.
        seed: the only source of randomness.
        mu: survivors of a generation, at least 1.
        lam: lambda, offspring of a generation, at least 1.
        initial: size of the hybrid first population, at least 1.
        mutation: a registered mutation, with options after a colon: "level_switch:max_moves=3,max_levels=1".
        crossover: a registered crossover, likewise; None goes without, as the paper does.
        crossover_rate: how likely an offspring has two parents, in [0, 1], where there is a crossover.

    Source: Diff-ES, whose setting is mu = 4, lambda = 16, 50 generations on DiT and 100 on SDXL, 800 and more
    evaluations. The defaults here are for searches of a hundred or so, where large generations leave too few of them.
    Here an offspring that was asked before is mutated on until it is new, so that no evaluation is spent twice.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        mu: int = 2,
        lam: int = 4,
        initial: int = 16,
        mutation: str = "level_switch",
        crossover: str | None = None,
        crossover_rate: float = 0.5,
    ) -> None:
        super().__init__(space, seed=seed)
        self.mu = at_least("mu", mu, 1)
        self.lam = at_least("lam", lam, 1)
        self.initial = at_least("initial", initial, 1)
        if not 0 <= crossover_rate <= 1:
            raise DiffesError(f"crossover_rate must be in [0, 1], got {crossover_rate}")
        self.mutation = mutation
        self.crossover = crossover
        self.crossover_rate = crossover_rate
        self._rng = np.random.default_rng(seed)
        self._toolbox = make_toolbox(space, self._rng, mutate=mutation, mate=crossover or "level_exchange")
        self._survivors: list[Genome] = []
        self._seen: set[tuple[int, ...]] = set()

    def _ask(self) -> list[list[int]]:
        batch = self._offspring() if self._survivors else hybrid(self.space, self._rng, self.initial)
        self._seen.update(map(tuple, batch))
        return batch

    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        pool = {tuple(genome): genome for genome in self._survivors}
        for evaluation in evaluations:
            genome = Genome(evaluation.schedule.levels)
            genome.fitness.values = (evaluation.fitness,)
            pool.setdefault(evaluation.schedule.levels, genome)
        self._survivors = self._toolbox.select(list(pool.values()), self.mu)

    def _offspring(self) -> list[list[int]]:
        """Lambda distinct unseen genomes (S,); fewer, and a seen one at the end, when no more of them are found."""
        batch: dict[tuple[int, ...], None] = {}
        while len(batch) < self.lam:
            taken = self._seen | batch.keys()
            child = self._child(taken)
            sample = None
            if child in taken:
                sample = sample_unseen(self.space, self._rng, taken)
                if sample is None:
                    batch.setdefault(child)
                    break
                self.origins[tuple(sample)] = Origin("random")
            batch.setdefault(child if sample is None else tuple(sample))
        return [list(child) for child in batch]

    def _child(self, taken: Set[tuple[int, ...]]) -> tuple[int, ...]:
        """A random survivor, or one crossed with another, mutated until it is not taken or patience ends."""
        n = len(self._survivors)
        parents = [self._survivors[int(self._rng.integers(n))]]
        child = self._toolbox.clone(parents[0])
        operators = [self.mutation]
        if self.crossover is not None and n > 1 and self._rng.random() < self.crossover_rate:
            others = [genome for genome in self._survivors if genome is not parents[0]]
            parents.append(others[int(self._rng.integers(n - 1))])
            child, _ = self._toolbox.mate(child, self._toolbox.clone(parents[1]))
            operators.insert(0, self.crossover)
        for _ in range(MUTATION_TRIES):
            (child,) = self._toolbox.mutate(child)
            if tuple(child) not in taken:
                break
        levels = tuple(int(level) for level in child)
        self.origins.setdefault(levels, Origin(" + ".join(operators), tuple(tuple(parent) for parent in parents)))
        return levels
