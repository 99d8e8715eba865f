"""MosaicDiff's heuristic: three segments of the trajectory, the middle one pruned least; no search at all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diffes.errors import DiffesError
from diffes.spaces.genome import Origin
from diffes.spaces.plan import schedules_only
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import Evaluation, Proposal, StageProfile, Strategy

LEAST = 0.25  # sparsity of the most important segment over that of the least important one


class Mosaic(Strategy):
    """Strategy that asks for one schedule, made from how fast the denoising loss changes along the trajectory.

    The score of a stage is the gradient of the denoising loss plus `weight` times the logarithm of the signal-to-noise
    ratio, both scaled to [0, 1]. Two edges divide the stages into the three segments whose scores are most uniform. The
    higher the score of a segment, the less it is pruned; the middle one is pruned least.

    Args:
        space: the feasible schedules.
        seed: not used, because nothing here is random; every strategy takes one.
        profile: loss and signal-to-noise ratio by stage; a run measures them.
        weight: lambda of the paper, at least 0.

    Raises:
        DiffesError: there is no profile, it has another number of stages, the weight is negative, or the space is one
            of plans.

    Source: MosaicDiff (Guo et al. 2025), which sets edges and sparsities by hand from such a score. The rule that finds
    them for any budget and number of stages is ours.
    """

    needs = ("profile",)

    def __init__(
        self, space: SearchSpace, *, seed: int, profile: StageProfile | None = None, weight: float = 0.1
    ) -> None:
        schedules_only(space, "mosaic")
        super().__init__(space, seed=seed)
        if profile is None or len(profile.loss) != space.n_stages:
            raise DiffesError(
                f"mosaic needs a profile with one entry for each of the {space.n_stages} stages, got {profile}"
            )
        if not weight >= 0:
            raise DiffesError(f"weight must be at least 0, got {weight}")
        self.profile = profile
        self.weight = weight
        self._exhausted = False

    def _ask(self) -> list[Proposal]:
        batch = [] if self._exhausted else [self.propose(self._levels(), origin=Origin("mosaic"))]
        self._exhausted = True
        return batch

    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Do nothing: there is nothing to learn."""

    def _levels(self) -> list[int]:
        loss, log_snr = np.array(self.profile.loss), np.array(self.profile.log_snr)
        slope = np.abs(np.gradient(loss)) if len(loss) > 1 else np.zeros(1)
        importance = segments(_unit(slope) + self.weight * _unit(log_snr))
        shape = 1 - (1 - LEAST) * importance
        top = self.space.max_level
        low, high = 0.0, 1 / LEAST
        for _ in range(50):  # find the least pruning within the budget
            middle = (low + high) / 2
            levels = [min(round(middle * top * s), top) for s in shape]
            low, high = (low, middle) if self.space.fits(levels) else (middle, high)
        levels = [min(round(high * top * s), top) for s in shape]
        return self.space.repair(levels, np.random.default_rng(0))


def segments(score: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the importance (S,) in [0, 1]: the mean score of each of three segments, the middle one the highest.

    The edges leave the least variance inside the segments. Fewer than three stages are a segment each.
    """
    n = len(score)
    if n < 3:
        return _unit(score)
    edges = min(
        itertools.combinations(range(1, n), 2),
        key=lambda pair: sum(((part - part.mean()) ** 2).sum() for part in np.split(score, pair)),
    )
    means = np.array([part.mean() for part in np.split(score, edges)])
    means[1] = means.max()
    return np.repeat(_unit(means), np.diff([0, *edges, n]))


def _unit(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale values to [0, 1]; return zeros where all are equal."""
    spread = np.ptp(values)
    return (values - values.min()) / spread if spread else np.zeros(len(values))
