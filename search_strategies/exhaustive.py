"""Exhaustive search of a small space, in order: it finds the optimum that other strategies are compared with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from diffes.errors import DiffesError, at_least
from diffes.spaces.plan import schedules_only
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import Evaluation, Proposal, Strategy


class Exhaustive(Strategy):
    """Strategy that asks for every feasible schedule once, in lexicographic order.

    Args:
        space: the feasible schedules.
        seed: not used, because nothing here is random; every strategy takes one.
        limit: largest number of feasible schedules that is accepted, at least 1.
        batch: number of schedules per batch, at least 1.

    Raises:
        DiffesError: the space is too large, or one of plans.
    """

    def __init__(self, space: SearchSpace, *, seed: int, limit: int = 100_000, batch: int = 64) -> None:
        schedules_only(space, "exhaustive")
        super().__init__(space, seed=seed)
        self.batch = at_least("batch", batch, 1)
        at_least("limit", limit, 1)
        if next(itertools.islice(feasible(space), limit, None), None) is not None:
            raise DiffesError(
                f"the space has more than {limit:,} feasible schedules ({space.n_stages} stages, levels 0 to "
                f"{space.max_level}). Use fewer stages, raise limit, or choose another strategy."
            )
        self._left = feasible(space)

    def _ask(self) -> list[Proposal]:
        return [self.propose(levels) for levels in itertools.islice(self._left, self.batch)]

    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Do nothing: there is nothing to learn."""


def feasible(space: SearchSpace) -> Iterator[list[int]]:
    """Yield all feasible genomes (S,) in lexicographic order, without walking through the others."""
    n, budget = space.n_stages, space.budget
    if budget is None:
        choices = [range(space.max_level + 1 if steps else 1) for steps in space.steps]
        yield from map(list, itertools.product(*choices))
        return
    cheapest = [0] * (n + 1)  # least and largest cost of the stages from s on
    most_expensive = [0] * (n + 1)
    for s in reversed(range(n)):
        cheapest[s] = cheapest[s + 1] + space.steps[s] * space.level_costs[s][-1]
        most_expensive[s] = most_expensive[s + 1] + space.steps[s] * space.level_costs[s][0]

    def extend(levels: list[int], cost: int, smallest_gain: float) -> Iterator[list[int]]:
        s = len(levels)
        if cost + cheapest[s] > budget or cost + most_expensive[s] + smallest_gain <= budget:
            return
        if s == n:
            yield levels
            return
        row = space.level_costs[s]
        for level in range(space.max_level + 1 if space.steps[s] else 1):
            gain = space.steps[s] * (row[level - 1] - row[level]) if level else float("inf")
            yield from extend([*levels, level], cost + space.steps[s] * row[level], min(smallest_gain, gain))

    yield from extend([], 0, float("inf"))
