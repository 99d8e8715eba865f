"""Allocation of a level over the group sets: the least sensitive split that costs no more than the equal one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffes.adapters import AnySet
from diffes.config import Allocation

Floats = NDArray[np.float64]
UNITS = 1 << 14  # resolution of savings: parts of the savings of the last level


def allocation_of(kind: str, wanted: Allocation) -> Allocation:
    """Return the allocation used for levels of a kind, or of several joined by "+", where `wanted` was asked for. Depth
    and reuse alone always use the equal split."""
    return wanted if "width" in kind.split("+") else "equal"


@dataclass(frozen=True)
class Rungs:
    """Sizes that a group set can be reduced to.

    Args:
        groups: the set.
        max_level: H.
        kept: falling numbers of groups that stay, from all of them to none.
        macs: multiply-accumulates of one group in one denoiser call.
    """

    groups: AnySet
    max_level: int
    kept: tuple[int, ...]
    macs: float

    @classmethod
    def of(cls, groups: AnySet, max_level: int, macs: float, finer: int = 1) -> Rungs:
        """Build the rungs that the levels use, and `finer` times as many where there are enough groups."""
        steps = finer * max_level
        kept = sorted({groups.n_kept(k, steps) for k in range(steps + 1)}, reverse=True)
        return cls(groups, max_level, tuple(kept), macs)

    @property
    def saved(self) -> Floats:
        """Multiply-accumulates saved at each rung (len(kept),)."""
        return self.macs * (self.groups.n_groups - np.array(self.kept, dtype=float))

    def equal(self, level: int) -> int:
        """Return the rung of a level that removes the same fraction of every set."""
        return self.kept.index(self.groups.n_kept(level, self.max_level))


def allocate(sets: Sequence[Rungs], damage: Sequence[Floats]) -> list[list[int]]:
    """Return the rung of every set at every level, (H + 1, sets): the split with the least sum of sensitivities that
    saves enough.

    Each level saves at least as many multiply-accumulates as the same fraction of every set would. The equal split is
    taken where its sum of sensitivities is no larger than that of the split that dynamic programming finds.

    Args:
        sets: the rungs of each set.
        damage: for each set, (len(kept),) the sensitivity of the prediction to each rung when only that set is pruned.

    Source: a multiple-choice knapsack, solved by dynamic programming over savings. Savings are rounded down, so that no
        split costs more than the equal one.
    """
    unit = sum(float(rungs.saved[-1]) for rungs in sets) / UNITS
    saved = [np.floor(rungs.saved / unit + 1e-6).astype(int) for rungs in sets]
    total = sum(int(each[-1]) for each in saved)
    least = np.full(total + 1, np.inf)
    least[0] = 0.0
    choices = []
    for gains, harms in zip(saved, damage, strict=True):
        options = np.full((len(gains), total + 1), np.inf)
        for row, gain, harm in zip(options, gains, harms, strict=True):
            row[gain:] = least[: total + 1 - gain] + harm
        choices.append(options.argmin(0))
        least = options.min(0)
    splits, max_level = [], sets[0].max_level
    for level in range(max_level + 1):
        equal = [rungs.equal(level) for rungs in sets]
        wanted = sum(float(rungs.saved[rung]) for rungs, rung in zip(sets, equal, strict=True))
        enough = int(np.ceil(wanted / unit - 1e-6))
        harm = sum(float(harms[rung]) for harms, rung in zip(damage, equal, strict=True))
        if level in (0, max_level) or enough > total or harm <= least[enough:].min():
            splits.append(equal)
            continue
        left, split = enough + int(least[enough:].argmin()), []
        for gains, choice in zip(reversed(saved), reversed(choices), strict=True):
            split.append(int(choice[left]))
            left -= int(gains[split[-1]])
        splits.append(split[::-1])
    return splits
