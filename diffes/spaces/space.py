"""Search space of schedules: stages, levels and a budget that every schedule meets exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from diffes.errors import DiffesError
from diffes.spaces.schedule import Schedule, Stages

Table = list[list[float]]  # (S, H + 1) cost of a call in each stage at each level
COST_RESOLUTION = 10**6  # measured costs are counted in millionths of the largest


@dataclass(frozen=True)
class SearchSpace:
    """Space of feasible schedules.

    A schedule costs `sum_s steps[s] * level_costs[s][levels[s]]`. It fits when that is within the budget. It is
    feasible when, besides, no single stage could be one level denser within the budget. With equal steps and linear
    costs this is the paper's equality, `sum_s L_s = S * target`; with unequal ones it is the nearest condition that
    always has a solution.

    Args:
        stages: their ranges of timesteps.
        max_level: H; levels go from 0 (dense) to H.
        steps: (S,) denoiser calls in each stage; a stage that is never visited stays at level 0.
        level_costs: (S, H + 1) cost of one denoiser call in each stage at each level: whole numbers that never rise
            with the level. A level that costs as much as the next denser one is never feasible.
        budget: the largest cost allowed, in the units of `steps * level_costs`. None allows all: every genome whose
            unvisited stages are dense is then feasible.
    """

    stages: Stages
    max_level: int
    steps: tuple[int, ...]
    level_costs: tuple[tuple[int, ...], ...]
    budget: int | None

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.stages) or min(self.steps) < 0 or sum(self.steps) == 0:
            raise DiffesError(f"steps must have {len(self.stages)} numbers of calls, not all 0, got {self.steps}")
        shape = len(self.stages), self.max_level + 1
        if np.shape(self.level_costs) != shape or (np.diff(self.level_costs) > 0).any():
            raise DiffesError(
                f"level_costs must be a table of {shape[0]} stages with {shape[1]} whole numbers each that never rise, "
                f"got {self.level_costs}"
            )
        smallest, largest = (self.cost([k] * len(self.stages)) for k in (self.max_level, 0))
        if self.budget is not None and not smallest <= self.budget:
            raise DiffesError(
                f"no schedule costs {self.budget} or less. Costs go from {smallest} (every stage at level "
                f"{self.max_level}) to {largest} (all dense). Raise the budget."
            )

    @classmethod
    def mean_sparsity(
        cls, stages: Stages, max_level: int, budget: float, steps: Sequence[int] | None = None
    ) -> SearchSpace:
        """Make a space with the paper's budget: a mean level over steps of `budget * max_level`.

        The mean level is rounded up to what levels can express.

        Args:
            stages: their ranges of timesteps.
            max_level: H.
            budget: mean sparsity in [0, 1].
            steps: (S,) denoiser calls per stage; all equal when left out.

        Raises:
            DiffesError: the budget is outside [0, 1].
        """
        if not (isinstance(budget, int | float) and 0 <= budget <= 1):
            raise DiffesError(
                f"budget must be a mean sparsity in [0, 1], got {budget}. With 0 the model stays dense; 1 removes "
                "everything that can be pruned."
            )
        steps = tuple(steps) if steps is not None else (1,) * len(stages)
        removed = math.ceil(round(budget * max_level * sum(steps), 9))
        costs = tuple(range(max_level, -1, -1))
        return cls(stages, max_level, steps, (costs,) * len(stages), max_level * sum(steps) - removed)

    @classmethod
    def dense_fraction(
        cls, stages: Stages, steps: Sequence[int], costs: Sequence[Sequence[float]], budget: float
    ) -> SearchSpace:
        """Make a space whose budget is a fraction of the dense model's measured cost: MACs or milliseconds.

        Args:
            stages: their ranges of timesteps.
            steps: (S,) denoiser calls per stage.
            costs: (S, H + 1) cost of one call in each stage at each level, in any unit. A level counts as much as the
                most expensive higher level, but at most as the dense one, so that no budget is exceeded.
            budget: largest cost of a schedule over that of the dense model, above 0 and at most 1.

        Raises:
            DiffesError: the budget is out of its range, or below what the highest level everywhere costs.
        """
        table = np.asarray(costs, dtype=float)
        falling = np.minimum(np.maximum.accumulate(table[:, ::-1], axis=1)[:, ::-1], table[:, :1])
        dense = float(np.asarray(steps) @ falling[:, 0])
        smallest = float(np.asarray(steps) @ falling[:, -1]) / dense
        if not (isinstance(budget, int | float) and smallest <= budget <= 1):
            raise DiffesError(
                f"budget must be a fraction of the dense cost in [{smallest:.4f}, 1], got {budget}. The highest level "
                f"in every stage costs {smallest:.4f}, and the dense model 1."
            )
        unit = float(falling[:, 0].max()) / COST_RESOLUTION
        whole = tuple(tuple(int(cost) for cost in row) for row in np.round(falling / unit))
        cheapest, dense = (sum(n * row[k] for n, row in zip(steps, whole, strict=True)) for k in (-1, 0))
        limit = max(math.floor(budget * dense * (1 + 1e-9)), cheapest)
        return cls(stages, falling.shape[1] - 1, tuple(steps), whole, limit)

    def without_budget(self) -> Self:
        """Return the same space without a limit on costs."""
        return replace(self, budget=None)

    @property
    def n_stages(self) -> int:
        """S, the length of a genome."""
        return len(self.stages)

    @property
    def visited(self) -> list[int]:
        """Stages with at least one denoiser call; the levels of others do not matter."""
        return [s for s, n in enumerate(self.steps) if n]

    @property
    def starts(self) -> tuple[tuple[int, ...], ...]:
        """Genomes (S,) that a search begins with, the most promising first, where some are known."""
        return ()

    @property
    def genes(self) -> tuple[int, ...]:
        """Values that a stage may have, rising."""
        return tuple(range(self.max_level + 1))

    @property
    def most_pruned(self) -> int:
        """Highest level of a denoiser call."""
        return self.max_level

    def called(self, levels: Sequence[int]) -> list[int]:
        """Return the stages in which a genome (S,) calls the denoiser; levels can be moved between them."""
        return self.visited

    def cost(self, levels: Sequence[int]) -> int:
        """Return the cost of a genome (S,), in the units of the budget."""
        return sum(n * row[level] for n, row, level in zip(self.steps, self.level_costs, levels, strict=True))

    def fits(self, levels: Sequence[int]) -> bool:
        """Check whether a genome (S,) costs no more than the budget."""
        in_range = len(levels) == self.n_stages and all(0 <= level <= self.max_level for level in levels)
        return in_range and (self.budget is None or self.cost(levels) <= self.budget)

    def is_feasible(self, levels: Sequence[int]) -> bool:
        """Check whether a genome (S,) meets the budget exactly, as the class defines it."""
        if not self.fits(levels):
            return False
        if self.budget is None:
            return all(n > 0 or level == 0 for n, level in zip(self.steps, levels, strict=True))
        cost = self.cost(levels)
        return all(cost + self._gain(s, level) > self.budget for s, level in enumerate(levels) if level > 0)

    def repair(self, levels: Sequence[int], rng: np.random.Generator) -> list[int]:
        """Return a feasible genome near any genome.

        Random stages are pruned more until the budget holds; then random stages are pruned less as far as it allows.

        Args:
            levels: (S,) integers; values outside [0, max_level] are clipped.
            rng: draws the stages.
        """
        repaired = [
            min(max(int(level), 0), self.max_level) if n else 0 for level, n in zip(levels, self.steps, strict=True)
        ]
        if self.budget is None:
            return repaired
        cost = self.cost(repaired)
        while cost > self.budget:
            s = int(rng.choice([s for s in self.visited if repaired[s] < self.max_level]))
            repaired[s] += 1
            cost -= self._gain(s, repaired[s])
        while denser := [s for s in self.visited if repaired[s] and cost + self._gain(s, repaired[s]) <= self.budget]:
            s = int(rng.choice(denser))
            cost += self._gain(s, repaired[s])
            repaired[s] -= 1
        return repaired

    def sample(self, rng: np.random.Generator) -> list[int]:
        """Draw a random feasible genome: independent uniform levels, repaired."""
        return self.repair(rng.integers(0, self.max_level + 1, self.n_stages).tolist(), rng)

    def uniform(self) -> list[int]:
        """Return the feasible genome nearest to a constant; a remainder is spread along the trajectory.

        Without a budget it is the dense genome.
        """
        if self.budget is None:
            return [0] * self.n_stages
        visited = self.visited
        level = next(k for k in range(self.max_level + 1) if self.cost([k] * self.n_stages) <= self.budget)
        for n_pruned in range(len(visited) + 1):
            levels = [0] * self.n_stages
            for s in visited:
                levels[s] = max(level - 1, 0)
            for i in range(n_pruned):
                levels[visited[int((i + 0.5) * len(visited) / n_pruned)]] = level
            if self.cost(levels) <= self.budget:
                break
        return self.repair(levels, np.random.default_rng(0))

    def constants(self) -> list[list[int]]:
        """Return the constant genome (S,) of each level, over the whole range of costs, whatever the budget."""
        return [[level if n else 0 for n in self.steps] for level in range(self.max_level + 1)]

    def counts(self, schedule: Schedule, fidelity: float) -> bool:
        """Check whether a measured schedule can be the result of a search: on all probes and within the budget."""
        return fidelity == 1 and self.fits(schedule.levels)

    def any_schedule(self, levels: Sequence[int]) -> Schedule:
        """Return a genome (S,) as an immutable schedule, whatever it costs."""
        return Schedule(self.stages, tuple(int(level) for level in levels), self.max_level)

    def schedule(self, levels: Sequence[int]) -> Schedule:
        """Return the genome as an immutable schedule.

        Raises:
            DiffesError: the genome does not meet the budget.
        """
        schedule = self.any_schedule(levels)
        if not self.is_feasible(schedule.levels):
            raise DiffesError(
                f"levels {list(schedule.levels)} cost {self.cost(schedule.levels)} and do not meet the budget of "
                f"{self.budget}. space.repair(levels, rng) returns levels that do."
            )
        return schedule

    def _gain(self, stage: int, level: int) -> int:
        """Return the added cost when a stage goes from `level` to the next denser one."""
        return self.steps[stage] * (self.level_costs[stage][level - 1] - self.level_costs[stage][level])


def first_computes(costs: Sequence[Sequence[float]], steps: Sequence[int], reusing: Sequence[int]) -> list[list[float]]:
    """Return costs (S, H + 1) of one call in which the first call of a run computes everything.

    At each level that reuses something, a call in the noisiest visited stage costs the mean over one dense call and the
    remaining ones.

    Args:
        costs: (S, H + 1).
        steps: (S,) denoiser calls in each stage.
        reusing: levels that reuse what an earlier call computed.
    """
    table = [list(row) for row in costs]
    noisiest = max(stage for stage, n in enumerate(steps) if n)
    for level in reusing:
        table[noisiest][level] += (table[noisiest][0] - table[noisiest][level]) / steps[noisiest]
    return table
