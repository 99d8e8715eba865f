"""The baseline without a search: the same level everywhere."""

from __future__ import annotations

from collections.abc import Sequence

from diffes.space import SearchSpace
from diffes.strategy import Evaluation, Strategy
from search_strategies.initial import uniform


class Uniform(Strategy):
    """Asks for the uniform schedule, once.

    Args:
        space: the feasible schedules.
        seed: taken like every strategy does; nothing here is random.
    """

    def __init__(self, space: SearchSpace, *, seed: int) -> None:
        super().__init__(space, seed=seed)
        self._exhausted = False

    def _ask(self) -> list[list[int]]:
        batch = [] if self._exhausted else [uniform(self.space)]
        self._exhausted = True
        return batch

    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        """There is nothing to learn."""
