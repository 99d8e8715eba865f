"""View of plans for the surrogate: where along the trajectory compute is spent and calls are made."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diffes.spaces.operators import MUTATIONS
from diffes.spaces.plan import PlanSpace

Floats = NDArray[np.float64]
BINS = 8  # number of places along the trajectory at which a plan is described
AROUND = 8  # mutations drawn around a plan


class PlanView:
    """View of plans for the model: their features, which are near, and which denoiser calls they share.

    Args:
        space: the feasible plans.
    """

    grid: Floats | None = None  # features are any numbers

    def __init__(self, space: PlanSpace) -> None:
        self.space = space
        self._mutation = MUTATIONS.default(space, small=True)
        nodes = (np.arange(space.n_stages) + 0.5) / space.n_stages
        centres = (np.arange(BINS) + 0.5) / BINS
        weights = np.maximum(1 - np.abs(nodes[:, None] - centres) * BINS, 0)  # triangles: near nodes look alike
        self._weights = weights / weights.sum(1, keepdims=True)
        costs = np.array(space.level_costs, dtype=float)
        self._costs = costs / costs[:, space.allowed[0]].mean()
        uniform = space.uniform()
        self._uniform_calls = len(space.called(uniform))
        self._scale = max(self._uniform_calls, 1) / BINS

    @property
    def n_features(self) -> int:
        """Number of features: two per bin."""
        return 2 * BINS

    def features(self, genomes: Sequence[Sequence[int]]) -> Floats:
        """Return `log(1 + x)` (n, 2 BINS) of compute spent and of calls made in each bin.

        `x` is about 1 where the uniform plan has its share.
        """
        plans = np.array(genomes)
        spent = self._costs[np.arange(self.space.n_stages), plans] @ self._weights
        called = (plans != self.space.skip) @ self._weights
        return np.log1p(np.hstack([spent, called]) / self._scale)

    def neighbours(self, levels: tuple[int, ...], rng: np.random.Generator) -> list[tuple[int, ...]]:
        """Return the distinct feasible plans that random single mutations lead to."""
        mutate = MUTATIONS.bind(self._mutation, 1, space=self.space, rng=rng)
        found = dict.fromkeys(tuple(mutate(list(levels))[0]) for _ in range(AROUND))
        found.pop(levels, None)
        return list(found)

    def states(self, levels: Sequence[int]) -> list[tuple[tuple[int, ...], float]]:
        """Return what decides the state after each call, in the order of sampling, and the price of the call.

        A call leads to the state at the next called node. All called nodes so far, that next one, and the levels before
        it decide the state. Prices are fractions of the number of calls of the uniform plan.
        """
        called = self.space.called(levels)[::-1]
        path = list(itertools.chain(*((node, levels[node]) for node in called)))
        ends = [*called[1:], -1]
        return [((*path[: 2 * i + 2], end), 1 / self._uniform_calls) for i, end in enumerate(ends)]
