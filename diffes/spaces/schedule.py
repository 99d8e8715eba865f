"""Schedules and plans: the level of each stage, or the timesteps that are called and the level of each call."""

from __future__ import annotations

import bisect
import itertools
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffes.errors import DiffesError


@dataclass(frozen=True)
class Stages:
    """Contiguous ranges of training timesteps, from the cleanest (stage 0) to the noisiest (stage S-1).

    Args:
        ranges: `(lo, hi)` per stage. Stage `s` holds the timesteps `lo <= t < hi`. The first starts at 0, each next one
            where the one before ends.

    Source: Diff-ES numbers stages so that sampling starts in stage S-1 and ends in stage 0.
    """

    ranges: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        edge = 0
        for lo, hi in self.ranges:
            if lo != edge or hi <= lo:
                raise DiffesError(
                    "stages must be ranges [lo, hi) of timesteps. The first must start at 0, and each where the one "
                    f"before ends. Got {list(self.ranges)}."
                )
            edge = hi
        if not self.ranges:
            raise DiffesError("stages must have at least one range of timesteps, got none")

    @classmethod
    def equal(cls, n_stages: int, n_timesteps: int = 1000) -> Stages:
        """Make `n_stages` stages of (nearly) equal width: stage s covers [s*T/S, (s+1)*T/S)."""
        if not 1 <= n_stages <= n_timesteps:
            raise DiffesError(f"n_stages must be in [1, {n_timesteps}], got {n_stages}")
        edges = [s * n_timesteps // n_stages for s in range(n_stages + 1)]
        return cls(tuple(itertools.pairwise(edges)))

    def __len__(self) -> int:
        return len(self.ranges)

    def stage_of(self, timestep: float) -> int:
        """Return the stage of a timestep, which may be fractional; one beyond an end belongs to the stage there."""
        uppers = [hi for _, hi in self.ranges]
        return min(bisect.bisect_right(uppers, timestep), len(self) - 1)

    def count_steps(self, timesteps: Iterable[float]) -> tuple[int, ...]:
        """Count the denoiser calls per stage (S,) of a sampling run that visits these timesteps."""
        counts = [0] * len(self)
        for timestep in timesteps:
            counts[self.stage_of(timestep)] += 1
        return tuple(counts)


@dataclass(frozen=True)
class Schedule:
    """Schedule: the level of each stage.

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
            raise DiffesError(
                f"a schedule needs one level per stage, got {len(self.levels)} for {len(self.stages)} stages"
            )
        _check_levels(self.levels, self.max_level)

    def nominal_sparsity(self, steps: Sequence[int]) -> float:
        """Return the removed fraction of the prunable parameters, averaged over steps.

        Args:
            steps: (S,) denoiser calls per stage.
        """
        total = sum(steps) * self.max_level
        return sum(n * level for n, level in zip(steps, self.levels, strict=True)) / total

    def key(self, timestep: float) -> tuple[int, int]:
        """Return the stage and level of a denoiser call at a timestep."""
        stage = self.stages.stage_of(timestep)
        return stage, self.levels[stage]

    def pruned(self) -> list[tuple[int, int]]:
        """Return the stage and level of every stage that is not dense."""
        return [(stage, level) for stage, level in enumerate(self.levels) if level]

    def to_json(self) -> dict[str, Any]:
        """Return `stages`, `levels` and `max_level` as plain lists and numbers."""
        return {
            "stages": [list(stage) for stage in self.stages.ranges],
            "levels": list(self.levels),
            "max_level": self.max_level,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Schedule:
        """Read the schedule that `to_json` wrote; other keys are ignored.

        Raises:
            DiffesError: a key is missing, or its value does not have that form.
        """
        try:
            stages = tuple((int(lo), int(hi)) for lo, hi in data["stages"])
            return cls(Stages(stages), tuple(data["levels"]), int(data["max_level"]))
        except DiffesError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DiffesError(f"the data are not a schedule ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Plan:
    """Plan: the timesteps that call the denoiser, the level of each call, and the solver's steps between them.

    Args:
        stages: the ranges of timesteps in which levels were calibrated.
        calls: timestep and level of each call in the order of sampling; timesteps are falling integers.
        max_level: H; levels are in [0, H], 0 is dense.
        solver: name of the solver that made the coefficients, or will make them.
        coefficients: one row per call (see `diffes.solvers.Row`); None where the solver makes them, from the timesteps
            alone or by a fit.
    """

    stages: Stages
    calls: tuple[tuple[int, int], ...]
    max_level: int
    solver: str
    coefficients: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        check_timesteps(self.timesteps, self.stages.ranges[-1][1])
        _check_levels(self.levels, self.max_level)
        if self.coefficients is not None:
            check_rows(self.coefficients, len(self.calls))

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Timesteps of the calls, the noisiest first."""
        return tuple(timestep for timestep, _ in self.calls)

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels of the calls, in the order of the timesteps."""
        return tuple(level for _, level in self.calls)

    @property
    def rows(self) -> str | tuple[tuple[float, ...], ...]:
        """Coefficients, or the name of the solver that makes them."""
        return self.solver if self.coefficients is None else self.coefficients

    def keys(self) -> list[tuple[int, int]]:
        """Return the stage and level of each call, in the order of the timesteps."""
        return [(self.stages.stage_of(timestep), level) for timestep, level in self.calls]

    def pruned(self) -> list[tuple[int, int]]:
        """Return the stage and level of every call that is not dense, without repeats."""
        return sorted({key for key in self.keys() if key[1]})

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads, as plain lists, texts and numbers."""
        rows = None if self.coefficients is None else [list(row) for row in self.coefficients]
        return {
            "stages": [list(stage) for stage in self.stages.ranges],
            "timesteps": list(self.timesteps),
            "levels": list(self.levels),
            "max_level": self.max_level,
            "solver": self.solver,
            "coefficients": rows,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Read a plan from `timesteps`, `levels`, `solver`, `stages`, `max_level` and, if present, `coefficients`.

        Other keys are ignored.

        Raises:
            DiffesError: a key is missing, or its value does not have the form above.
        """
        try:
            stages = tuple((int(lo), int(hi)) for lo, hi in data["stages"])
            calls = tuple(zip(map(int, data["timesteps"]), data["levels"], strict=True))
            rows = data.get("coefficients")
            coefficients = None if rows is None else tuple(tuple(row) for row in rows)
            return cls(Stages(stages), calls, int(data["max_level"]), str(data["solver"]), coefficients)
        except DiffesError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DiffesError(f"the data are not a plan ({type(error).__name__}: {error})") from error


def _check_levels(levels: Sequence[int], max_level: int) -> None:
    for level in levels:
        if type(level) is not int or not 0 <= level <= max_level:
            raise DiffesError(f"levels must be whole numbers in [0, {max_level}], got {level!r}")


def check_timesteps(timesteps: Sequence[int], n_timesteps: int) -> None:
    """Check the timesteps of a plan.

    Raises:
        DiffesError: there are none, they do not fall, or one is no whole number in [0, `n_timesteps`).
    """
    if not all(isinstance(t, numbers.Integral) and not isinstance(t, bool) for t in timesteps):
        raise DiffesError(f"the timesteps of a plan must be whole numbers, got {list(timesteps)}")
    if not len(timesteps) or any(not 0 <= t < n_timesteps for t in timesteps):
        raise DiffesError(f"a plan needs one or more timesteps, all in [0, {n_timesteps - 1}], got {list(timesteps)}")
    if any(a <= b for a, b in itertools.pairwise(timesteps)):
        raise DiffesError(f"each timestep of a plan must be below the one before, got {list(timesteps)}")


def check_rows(rows: Sequence[Sequence[float]], n: int) -> None:
    """Check the coefficients of a plan of `n` calls.

    Raises:
        DiffesError: there are more or fewer rows than calls, row `i` has fewer than 2 or more than `i` + 2 numbers, or
            a number is not finite.
    """
    if len(rows) != n:
        raise DiffesError(f"a plan of {n} calls needs {n} rows of coefficients, got {len(rows)}")
    for i, row in enumerate(rows):
        if not 2 <= len(row) <= i + 2:
            raise DiffesError(
                f"row {i} of the coefficients must have 2 to {i + 2} numbers, got {len(row)}: one for the latents, and "
                "one for each prediction that it uses"
            )
        if not all(isinstance(each, int | float) and math.isfinite(each) for each in row):
            raise DiffesError(f"row {i} of the coefficients must have finite numbers, got {list(row)}")
