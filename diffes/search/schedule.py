"""What a sampling run does where: the level of each stage, or the timesteps that are called and the level of each."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diffes.errors import DiffesError

Allocation = Literal["damage", "equal"]  # how a level is shared out over the layers


@dataclass(frozen=True)
class Stages:
    """Contiguous ranges of training timesteps, from the cleanest (stage 0) to the noisiest (stage S-1).

    Args:
        ranges: `(lo, hi)` per stage; stage `s` holds the timesteps `lo <= t < hi`; the first starts at 0, each next one
            where the one before ended.

    Source: Diff-ES numbers stages so that sampling starts in stage S-1 and ends in stage 0.
    """

    ranges: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        edge = 0
        for lo, hi in self.ranges:
            if lo != edge or hi <= lo:
                raise DiffesError(
                    f"stages must be contiguous [lo, hi) ranges of timesteps that start at 0, got {list(self.ranges)}"
                )
            edge = hi
        if not self.ranges:
            raise DiffesError("Stages need at least one range, got none")

    @classmethod
    def equal(cls, n_stages: int, n_timesteps: int = 1000) -> Stages:
        """`n_stages` stages of (nearly) equal width: stage s covers [s*T/S, (s+1)*T/S)."""
        if not 1 <= n_stages <= n_timesteps:
            raise DiffesError(f"n_stages must be in [1, {n_timesteps}], got {n_stages}")
        edges = [s * n_timesteps // n_stages for s in range(n_stages + 1)]
        return cls(tuple(itertools.pairwise(edges)))

    def __len__(self) -> int:
        return len(self.ranges)

    def stage_of(self, timestep: float) -> int:
        """The stage of a timestep; fractional ones count too, and those beyond an end belong to the end's stage."""
        uppers = [hi for _, hi in self.ranges]
        return min(bisect.bisect_right(uppers, timestep), len(self) - 1)

    def count_steps(self, timesteps: Iterable[float]) -> tuple[int, ...]:
        """Denoiser calls per stage (S,) of a sampling run that visits these timesteps."""
        counts = [0] * len(self)
        for timestep in timesteps:
            counts[self.stage_of(timestep)] += 1
        return tuple(counts)


@dataclass(frozen=True)
class Schedule:
    """The level of each stage.

    Args:
        stages: their ranges of timesteps.
        levels: (S,) integers in [0, max_level], stage 0 (cleanest) first; 0 is dense, `k` removes `k / max_level`.
        max_level: H, the number of attention heads (width) or of blocks (depth).
    """

    stages: Stages
    levels: tuple[int, ...]
    max_level: int

    def __post_init__(self) -> None:
        if len(self.levels) != len(self.stages):
            raise DiffesError(f"a schedule needs one level per stage, got {len(self.levels)} for {len(self.stages)}")
        _check_levels(self.levels, self.max_level)

    def nominal_sparsity(self, steps: Sequence[int]) -> float:
        """Removed fraction of the prunable parameters, averaged over steps; `steps` (S,) are the calls per stage."""
        total = sum(steps) * self.max_level
        return sum(n * level for n, level in zip(steps, self.levels, strict=True)) / total

    def key(self, timestep: float) -> tuple[int, int]:
        """Stage and level of a denoiser call at a timestep."""
        stage = self.stages.stage_of(timestep)
        return stage, self.levels[stage]

    def thin(self) -> list[tuple[int, int]]:
        """Stage and level of every stage that is not dense."""
        return [(stage, level) for stage, level in enumerate(self.levels) if level]

    def to_json(self) -> dict[str, Any]:
        """`stages`, `levels` and `max_level` as plain lists and numbers."""
        return {
            "stages": [list(stage) for stage in self.stages.ranges],
            "levels": list(self.levels),
            "max_level": self.max_level,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Schedule:
        """The schedule that `to_json` wrote; other keys are left alone.

        Raises:
            DiffesError: a key is missing or its value is not of the form above.
        """
        try:
            stages = tuple((int(lo), int(hi)) for lo, hi in data["stages"])
            return cls(Stages(stages), tuple(data["levels"]), int(data["max_level"]))
        except DiffesError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DiffesError(f"this is no schedule: {type(error).__name__} {error}") from error


@dataclass(frozen=True)
class Plan:
    """Which timesteps call the denoiser, each at which level, by which solver.

    Args:
        stages: the ranges of timesteps in which levels were calibrated.
        calls: timestep and level of each call in the order of sampling; timesteps are whole and fall.
        max_level: H; levels are in [0, H], 0 is dense.
        solver: name of the solver that steps from one to the next.
    """

    stages: Stages
    calls: tuple[tuple[int, int], ...]
    max_level: int
    solver: str

    def __post_init__(self) -> None:
        top = self.stages.ranges[-1][1]
        edges = [top, *self.timesteps, -1]
        if not self.calls or any(a <= b for a, b in itertools.pairwise(edges)):
            raise DiffesError(
                f"the timesteps of a plan must fall within [0, {top - 1}], at least one, got {list(self.timesteps)}"
            )
        _check_levels(self.levels, self.max_level)

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Of the calls, the noisiest first."""
        return tuple(timestep for timestep, _ in self.calls)

    @property
    def levels(self) -> tuple[int, ...]:
        """Of the calls, in the order of the timesteps."""
        return tuple(level for _, level in self.calls)

    def key(self, timestep: float) -> tuple[int, int]:
        """Stage and level of a denoiser call at a timestep.

        Raises:
            DiffesError: the plan does not call there.
        """
        for known, level in self.calls:
            if known == timestep:
                return self.stages.stage_of(timestep), level
        raise DiffesError(
            f"the denoiser was called at timestep {timestep:g}, which the plan that is applied does not visit: it runs "
            f"with its own scheduler and num_inference_steps={len(self.calls)}; call diffes.remove(pipe) to go back to "
            "other schedulers and numbers of steps"
        )

    def thin(self) -> list[tuple[int, int]]:
        """Stage and level of every call that is not dense, each once."""
        return sorted({self.key(timestep) for timestep, level in self.calls if level})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The plan of `timesteps`, `levels`, `solver`, `stages` and `max_level`; other keys are left alone.

        Raises:
            DiffesError: a key is missing or its value is not of the form above.
        """
        try:
            stages = tuple((int(lo), int(hi)) for lo, hi in data["stages"])
            calls = tuple(zip(map(int, data["timesteps"]), data["levels"], strict=True))
            return cls(Stages(stages), calls, int(data["max_level"]), str(data["solver"]))
        except DiffesError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DiffesError(f"this is no plan: {type(error).__name__} {error}") from error


def _check_levels(levels: Sequence[int], max_level: int) -> None:
    for level in levels:
        if type(level) is not int or not 0 <= level <= max_level:
            raise DiffesError(f"levels must be integers in [0, {max_level}], got {level!r}")
