"""Random search: random schedules within the budget, the baseline that a search has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffes.errors import at_least
from diffes.spaces.initial import sample_unseen
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import Evaluation, Proposal, Strategy


class RandomSearch(Strategy):
    """Strategy that asks for random schedules, none of them twice, until it finds no more.

    Args:
        space: the feasible schedules.
        seed: the only source of randomness.
        batch: number of schedules per batch, at least 1.
    """

    def __init__(self, space: SearchSpace, *, seed: int, batch: int = 16) -> None:
        super().__init__(space, seed=seed)
        self.batch = at_least("batch", batch, 1)
        self._rng = np.random.default_rng(seed)
        self._seen: set[tuple[int, ...]] = set()

    def _ask(self) -> list[Proposal]:
        batch: list[Proposal] = []
        while len(batch) < self.batch and (levels := sample_unseen(self.space, self._rng, self._seen)) is not None:
            self._seen.add(tuple(levels))
            batch.append(self.propose(levels))
        return batch

    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Do nothing: there is nothing to learn."""
