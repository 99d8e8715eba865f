"""Mutations, in DEAP's convention: each changes a genome and returns it in a tuple."""

from __future__ import annotations

import functools
import itertools

import numpy as np

from diffes.errors import at_least
from diffes.spaces.genome import Genome
from diffes.spaces.operators import default_of, mended
from diffes.spaces.space import SearchSpace


@default_of(SearchSpace)
def level_switch(
    genome: Genome, *, space: SearchSpace, rng: np.random.Generator, max_moves: int = 5, max_levels: int = 2
) -> tuple[Genome]:
    """Shift a few levels between pairs of stages.

    It makes `n = min(U{1..m}, U{1..m})` moves. Each draws two distinct visited stages i and j and an amount `a` in
    `U{1..A}`, and shifts `min(a, L_i, H - L_j)` levels from i to j. That keeps the sum of levels, hence the budget
    where steps are equal and costs linear; in other spaces a genome that left the budget is repaired. A genome of a
    single visited stage stays as it is. In a plan, the called nodes count as visited stages.

    Args:
        genome: feasible levels (S,); changed in place.
        space: the feasible schedules.
        rng: draws everything.
        max_moves: m, at least 1.
        max_levels: A, at least 1.

    Source: the level-switch mutation of EvoPress as Diff-ES uses it, with the defaults of Diff-ES' public code. Here
    stages without a denoiser call are left out and the amount is clipped, not redrawn.
    """
    at_least("max_moves", max_moves, 1)
    at_least("max_levels", max_levels, 1)
    called = space.called(genome)
    if len(called) < 2:
        return (genome,)
    for _ in range(int(rng.integers(1, max_moves + 1, 2).min())):
        i, j = (int(stage) for stage in rng.choice(called, 2, replace=False))
        shift = min(int(rng.integers(1, max_levels + 1)), genome[i], space.most_pruned - genome[j])
        genome[i] -= shift
        genome[j] += shift
    return (mended(genome, space, rng),)


level_switch_small = default_of(SearchSpace, small=True)(functools.partial(level_switch, max_moves=3, max_levels=1))
"""`level_switch` with the small moves that EvoPress' own ablation found best (m = 3, A = 1)."""


def swap_stages(genome: Genome, *, space: SearchSpace, rng: np.random.Generator) -> tuple[Genome]:
    """Exchange the levels of two visited stages that differ; a genome of equal levels stays as it is."""
    pairs = [(i, j) for i, j in itertools.combinations(space.visited, 2) if genome[i] != genome[j]]
    if pairs:
        i, j = pairs[int(rng.integers(len(pairs)))]
        genome[i], genome[j] = genome[j], genome[i]
    return (mended(genome, space, rng),)


def shift_window(genome: Genome, *, space: SearchSpace, rng: np.random.Generator, max_shift: int = 2) -> tuple[Genome]:
    """Rotate the levels of a window of visited stages by a few stages: move a pattern along the trajectory.

    Args:
        genome: feasible levels (S,); changed in place.
        space: the feasible schedules.
        rng: draws the window, the distance in `U{1..max_shift}` and the direction.
        max_shift: at least 1.
    """
    at_least("max_shift", max_shift, 1)
    visited = space.visited
    if len(visited) >= 2:
        first, last = sorted(int(i) for i in rng.choice(len(visited), 2, replace=False))
        window = visited[first : last + 1]
        shift = int(rng.integers(1, max_shift + 1)) * (1 if rng.random() < 0.5 else -1)
        for stage, level in zip(window, np.roll([genome[s] for s in window], shift), strict=True):
            genome[stage] = int(level)
    return (mended(genome, space, rng),)


def level_step(genome: Genome, *, space: SearchSpace, rng: np.random.Generator, max_levels: int = 2) -> tuple[Genome]:
    """Raise or lower the level of one visited stage by `U{1..max_levels}`; the repair changes others in return.

    In a space without a budget this is the step that changes what a schedule costs.

    Args:
        genome: feasible levels (S,); changed in place.
        space: the feasible schedules.
        rng: draws everything.
        max_levels: at least 1.
    """
    at_least("max_levels", max_levels, 1)
    stage = int(rng.choice(space.called(genome)))
    change = int(rng.integers(1, max_levels + 1)) * (1 if rng.random() < 0.5 else -1)
    genome[stage] = min(max(genome[stage] + change, 0), space.most_pruned)
    return (mended(genome, space, rng),)


def segment_transfer(
    genome: Genome, *, space: SearchSpace, rng: np.random.Generator, max_length: int = 3, max_levels: int = 2
) -> tuple[Genome]:
    """Lower the levels of one segment of the trajectory and raise those of another of the same length, stage by stage.

    Args:
        genome: feasible levels (S,); changed in place.
        space: the feasible schedules.
        rng: draws the length in `U{1..max_length}` (at most half of the stages), two segments that do not overlap, and
            the amount in `U{1..max_levels}`.
        max_length: at least 1.
        max_levels: at least 1.
    """
    at_least("max_length", max_length, 1)
    at_least("max_levels", max_levels, 1)
    called = space.called(genome)
    if len(called) < 2:
        return (genome,)
    length = int(rng.integers(1, min(max_length, len(called) // 2) + 1))
    # draw two starts at least `length` apart, in the shorter row that is left without the first segment's body
    first, second = sorted(int(i) for i in rng.choice(len(called) - 2 * length + 2, 2, replace=False))
    segments = [called[first : first + length], called[second + length - 1 : second + 2 * length - 1]]
    source, target = segments if rng.random() < 0.5 else segments[::-1]
    amount = int(rng.integers(1, max_levels + 1))
    for i, j in zip(source, target, strict=True):
        shift = min(amount, genome[i], space.most_pruned - genome[j])
        genome[i] -= shift
        genome[j] += shift
    return (mended(genome, space, rng),)
