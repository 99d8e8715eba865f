"""Uniform schedule: the baseline without a search, the same level everywhere."""

from __future__ import annotations

from collections.abc import Sequence

from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import Evaluation, Proposal, Strategy


class Uniform(Strategy):
    """Strategy that asks for the uniform schedule, once.

    Args:
        space: the feasible schedules.
        seed: not used, because nothing here is random; every strategy takes one.
    """

    def __init__(self, space: SearchSpace, *, seed: int) -> None:
        super().__init__(space, seed=seed)
        self._exhausted = False

    def _ask(self) -> list[Proposal]:
        batch = [] if self._exhausted else [self.propose(self.space.uniform())]
        self._exhausted = True
        return batch

    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Do nothing: there is nothing to learn."""
