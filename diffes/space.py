"""The schedules a search may visit: stages, levels and a budget that every one of them meets exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffes.errors import DiffesError
from diffes.schedule import Schedule, StagePlan


@dataclass(frozen=True)
class SearchSpace:
    """Feasible schedules.

    A schedule costs `sum_s steps[s] * level_costs[levels[s]]`. It is feasible when that is within the budget and no
    single stage could be one level denser without leaving it. With equal steps and linear costs this is the paper's
    equality, `sum_s L_s = S * target`; with unequal ones it is the nearest thing to it that always has a solution.

    Args:
        plan: the stages.
        max_level: H; levels go from 0 (dense) to H.
        steps: (S,) denoiser calls in each stage; a stage that is never visited stays at level 0.
        level_costs: (H + 1,) cost of one denoiser call at each level, whole numbers, falling.
        budget: the largest cost allowed, in the units of `steps * level_costs`.
    """

    plan: StagePlan
    max_level: int
    steps: tuple[int, ...]
    level_costs: tuple[int, ...]
    budget: int

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.plan) or min(self.steps) < 0 or sum(self.steps) == 0:
            raise DiffesError(f"steps must be {len(self.plan)} counts with a positive sum, got {self.steps}")
        if len(self.level_costs) != self.max_level + 1 or any(np.diff(self.level_costs) >= 0):
            raise DiffesError(f"level_costs must be {self.max_level + 1} falling whole numbers, got {self.level_costs}")
        smallest, largest = (sum(self.steps) * self.level_costs[k] for k in (-1, 0))
        if not smallest <= self.budget:
            raise DiffesError(
                f"no schedule costs {self.budget} or less: the smallest possible is {smallest} (every stage at level "
                f"{self.max_level}), the largest {largest} (all dense); raise the budget"
            )

    @classmethod
    def mean_sparsity(
        cls, plan: StagePlan, max_level: int, budget: float, steps: Sequence[int] | None = None
    ) -> SearchSpace:
        """The paper's budget: the mean level over steps is `budget * max_level`, rounded up to what levels can express.

        Args:
            plan: the stages.
            max_level: H.
            budget: mean sparsity in [0, 1].
            steps: (S,) denoiser calls per stage; all equal when left out.

        Raises:
            DiffesError: the budget is outside [0, 1].
        """
        if not (isinstance(budget, int | float) and 0 <= budget <= 1):
            raise DiffesError(
                f"budget must be a mean sparsity in [0, 1], got {budget}: 0 is the dense model, the smallest possible, "
                "and 1 removes every prunable group, the largest possible"
            )
        steps = tuple(steps) if steps is not None else (1,) * len(plan)
        removed = math.ceil(round(budget * max_level * sum(steps), 9))
        costs = tuple(range(max_level, -1, -1))
        return cls(plan, max_level, steps, costs, max_level * sum(steps) - removed)

    @property
    def n_stages(self) -> int:
        """S, the length of a genome."""
        return len(self.plan)

    @property
    def visited(self) -> list[int]:
        """Stages with at least one denoiser call: the only ones whose level matters."""
        return [s for s, n in enumerate(self.steps) if n]

    def cost(self, levels: Sequence[int]) -> int:
        """Cost of a genome (S,), in the units of the budget."""
        return sum(n * self.level_costs[level] for n, level in zip(self.steps, levels, strict=True))

    def is_feasible(self, levels: Sequence[int]) -> bool:
        """Whether a genome (S,) meets the budget exactly, in the sense of the class."""
        if len(levels) != self.n_stages or any(not 0 <= level <= self.max_level for level in levels):
            return False
        cost = self.cost(levels)
        return cost <= self.budget and all(
            cost + self._gain(s, level) > self.budget for s, level in enumerate(levels) if level > 0
        )

    def repair(self, levels: Sequence[int], rng: np.random.Generator) -> list[int]:
        """A feasible genome near any genome: random stages are thinned until the budget holds, then thickened.

        Args:
            levels: (S,) integers; values outside [0, max_level] are clipped.
            rng: draws the stages.
        """
        repaired = [
            min(max(int(level), 0), self.max_level) if n else 0 for level, n in zip(levels, self.steps, strict=True)
        ]
        cost = self.cost(repaired)
        while cost > self.budget:
            s = int(rng.choice([s for s in self.visited if repaired[s] < self.max_level]))
            repaired[s] += 1
            cost -= self._gain(s, repaired[s])
        while thicker := [s for s in self.visited if repaired[s] and cost + self._gain(s, repaired[s]) <= self.budget]:
            s = int(rng.choice(thicker))
            cost += self._gain(s, repaired[s])
            repaired[s] -= 1
        return repaired

    def sample(self, rng: np.random.Generator) -> list[int]:
        """A random feasible genome: independent uniform levels, repaired."""
        return self.repair(rng.integers(0, self.max_level + 1, self.n_stages).tolist(), rng)

    def uniform(self) -> list[int]:
        """The feasible genome nearest to a constant; what does not divide evenly is spread along the trajectory."""
        visited = self.visited
        level = next(k for k in range(self.max_level + 1) if sum(self.steps) * self.level_costs[k] <= self.budget)
        for n_thinner in range(len(visited) + 1):
            levels = [0] * self.n_stages
            for s in visited:
                levels[s] = max(level - 1, 0)
            for i in range(n_thinner):
                levels[visited[int((i + 0.5) * len(visited) / n_thinner)]] = level
            if self.cost(levels) <= self.budget:
                break
        return self.repair(levels, np.random.default_rng(0))

    def schedule(self, levels: Sequence[int]) -> Schedule:
        """The genome as an immutable schedule.

        Raises:
            DiffesError: the genome does not meet the budget.
        """
        schedule = Schedule(self.plan, tuple(int(level) for level in levels), self.max_level)
        if not self.is_feasible(schedule.levels):
            raise DiffesError(
                f"levels {list(schedule.levels)} cost {self.cost(schedule.levels)}, not the budget of {self.budget}"
            )
        return schedule

    def _gain(self, stage: int, level: int) -> int:
        """Added cost when a stage goes from `level` to the next denser one."""
        return self.steps[stage] * (self.level_costs[level - 1] - self.level_costs[level])
