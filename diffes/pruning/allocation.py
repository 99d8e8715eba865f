"""Allocation of a level over the group sets: the least sensitive split that costs no more than the equal one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from diffes.adapters.groups import Prunable
from diffes.errors import DiffesError

Floats = NDArray[np.float64]
S = TypeVar("S", bound=Prunable)
UNITS = 1 << 14  # resolution of savings: parts of the savings of the last level


def normalised(allocation: str) -> Literal["sensitivity", "equal"]:
    """Return the name of an allocation: "sensitivity", called "damage" in older settings and files, or "equal".

    Raises:
        DiffesError: it is none of these.
    """
    if allocation in ("sensitivity", "damage"):
        return "sensitivity"
    if allocation == "equal":
        return "equal"
    raise DiffesError(f"allocation must be sensitivity or equal, got {allocation!r}")


def allocation_of(kind: str, wanted: str) -> str:
    """Return the allocation used for levels of a kind, or of several joined by "+", where `wanted` was asked for. Depth
    and reuse alone always use the equal split."""
    return wanted if "width" in kind.split("+") else "equal"


def by_sensitivity(kind: str, wanted: str) -> bool:
    """Return True where the levels of a kind are allocated by sensitivity if `wanted` was asked for."""
    return normalised(allocation_of(kind, wanted)) == "sensitivity"


@dataclass(frozen=True)
class Rungs(Generic[S]):
    """Sizes that a group set can be reduced to.

    Args:
        groups: the set.
        max_level: H.
        kept: falling numbers of groups that stay, from all of them to none.
        macs: multiply-accumulates of one group in one denoiser call.
    """

    groups: S
    max_level: int
    kept: tuple[int, ...]
    macs: float

    @classmethod
    def of(cls, groups: S, max_level: int, macs: float, finer: int = 1) -> Rungs[S]:
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


def allocate(sets: Sequence[Rungs[Any]], sensitivity: Sequence[Floats]) -> list[list[int]]:
    """Return the rung of every set at every level, (H + 1, sets): the split with the least sum of sensitivities that
    saves enough.

    Each level saves at least as many multiply-accumulates as the same fraction of every set would. The equal split is
    taken where its sum of sensitivities is no larger than that of the split that dynamic programming finds.

    Args:
        sets: the rungs of each set.
        sensitivity: for each set, (len(kept),) that of the prediction to each rung when only that set is pruned.

    Source: a multiple-choice knapsack, solved by dynamic programming over savings. Savings are rounded down, so that no
        split costs more than the equal one.
    """
    unit = sum(float(rungs.saved[-1]) for rungs in sets) / UNITS
    saved = [np.floor(rungs.saved / unit + 1e-6).astype(int) for rungs in sets]
    total = sum(int(each[-1]) for each in saved)
    least = np.full(total + 1, np.inf)
    least[0] = 0.0
    choices = []
    for gains, costs in zip(saved, sensitivity, strict=True):
        options = np.full((len(gains), total + 1), np.inf)
        for row, gain, cost in zip(options, gains, costs, strict=True):
            row[gain:] = least[: total + 1 - gain] + cost
        choices.append(options.argmin(0))
        least = options.min(0)
    splits, max_level = [], sets[0].max_level
    for level in range(max_level + 1):
        equal = [rungs.equal(level) for rungs in sets]
        wanted = sum(float(rungs.saved[rung]) for rungs, rung in zip(sets, equal, strict=True))
        enough = int(np.ceil(wanted / unit - 1e-6))
        cost = sum(float(costs[rung]) for costs, rung in zip(sensitivity, equal, strict=True))
        if level in (0, max_level) or enough > total or cost <= least[enough:].min():
            splits.append(equal)
            continue
        left, split = enough + int(least[enough:].argmin()), []
        for gains, choice in zip(reversed(saved), reversed(choices), strict=True):
            split.append(int(choice[left]))
            left -= int(gains[split[-1]])
        splits.append(split[::-1])
    return splits
