"""Which layers give what a level takes: the split over the group sets that does least damage at no more cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffes.adapters import AnySet
from diffes.search.schedule import Allocation

Floats = NDArray[np.float64]
UNITS = 1 << 14  # savings are counted in so many parts of what the last level saves


def allocation_of(kind: str, wanted: Allocation) -> Allocation:
    """How levels of a kind, or of several joined by "+", are shared out where `wanted` was asked for: whole blocks and
    reuse know the equal split only."""
    return wanted if "width" in kind.split("+") else "equal"


@dataclass(frozen=True)
class Rungs:
    """What a group set can be reduced to.

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
        """All that levels ask for, and `finer` times as many where there are groups enough."""
        steps = finer * max_level
        kept = sorted({groups.n_kept(k, steps) for k in range(steps + 1)}, reverse=True)
        return cls(groups, max_level, tuple(kept), macs)

    @property
    def saved(self) -> Floats:
        """(len(kept),) multiply-accumulates saved at each."""
        return self.macs * (self.groups.n_groups - np.array(self.kept, dtype=float))

    def equal(self, level: int) -> int:
        """The rung of a level that takes the same fraction from every set."""
        return self.kept.index(self.groups.n_kept(level, self.max_level))


def allocate(sets: Sequence[Rungs], damage: Sequence[Floats]) -> list[list[int]]:
    """The rung of every set at every level, (H + 1, sets): the least sum of damages that saves enough.

    Each level saves at least the multiply-accumulates that the same fraction of every set would. Where that equal split
    has no larger sum of damages than what the programme finds, it is taken.

    Args:
        sets: what each set can be reduced to.
        damage: for each set, (len(kept),) what each rung does to the prediction when only that set is thin.

    Source: a multiple-choice knapsack, solved by dynamic programming over what is saved; savings are rounded down, so
        that no split costs more than the equal one.
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
