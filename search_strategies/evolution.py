"""The paper's search: an elitist (mu + lambda) evolution by level-switch mutation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffes.errors import at_least
from diffes.space import SearchSpace
from diffes.strategy import Evaluation, Strategy
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
        mutation: name of a registered mutation.
        mutation_params: further keyword arguments of the mutation.

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
        mutation_params: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(space, seed=seed)
        self.mu = at_least("mu", mu, 1)
        self.lam = at_least("lam", lam, 1)
        self.initial = at_least("initial", initial, 1)
        self._rng = np.random.default_rng(seed)
        self._toolbox = make_toolbox(space, self._rng, mutate=mutation, **(mutation_params or {}))
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
            child = self._mutated(taken)
            sample = sample_unseen(self.space, self._rng, taken) if tuple(child) in taken else child
            batch.setdefault(tuple(sample or child))
            if sample is None:
                break
        return [list(child) for child in batch]

    def _mutated(self, taken: set[tuple[int, ...]]) -> list[int]:
        """A random survivor, mutated again and again until it is not among those taken, or patience ends."""
        child = self._toolbox.clone(self._survivors[int(self._rng.integers(len(self._survivors)))])
        del child.fitness.values
        for _ in range(MUTATION_TRIES):
            (child,) = self._toolbox.mutate(child)
            if tuple(child) not in taken:
                break
        return [int(level) for level in child]
