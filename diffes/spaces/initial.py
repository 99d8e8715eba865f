"""First populations: schedules or plans designed for a space, and random ones that were not seen before."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Container, Iterator

import numpy as np

from diffes.spaces.operators import MUTATIONS
from diffes.spaces.plan import PlanSpace
from diffes.spaces.space import SearchSpace

SAMPLE_TRIES = 200
MIXES = 3  # number of evenly spaced plans at higher levels in a first population

# Profiles over the trajectory: x in (0, 1) runs from the first sampled stage (S-1) to the last (0), i counts them.
# Positive means a higher level.
SHAPES: dict[str, Callable[[float, int], float]] = {
    "front_heavy": lambda x, i: 1.0 if x < 0.5 else -1.0,
    "back_heavy": lambda x, i: 1.0 if x > 0.5 else -1.0,
    "middle_heavy": lambda x, i: 1.0 if 0.25 < x < 0.75 else -1.0,
    "ends_heavy": lambda x, i: -1.0 if 0.25 < x < 0.75 else 1.0,
    "ramp_down": lambda x, i: 0.5 - x,
    "ramp_up": lambda x, i: x - 0.5,
    "zigzag": lambda x, i: 1.0 if i % 2 == 0 else -1.0,
}


def shapes(space: SearchSpace) -> list[list[int]]:
    """Build feasible genomes (S,) of the seven shapes, in the order of `SHAPES`.

    Each swings around the uniform schedule's mean level as far as [0, H] allows and is then repaired. They are
    distinct: there are fewer than seven where too few visited stages or levels make some of them alike.
    """
    found: dict[tuple[int, ...], None] = {}
    for number, profile in enumerate(SHAPES.values()):
        found.setdefault(tuple(space.repair(_swing(space, profile), np.random.default_rng(number))))
    return [list(levels) for levels in found]


@functools.singledispatch
def designed(space: SearchSpace, rng: np.random.Generator, size: int) -> Iterator[list[int]]:
    """Yield the genomes (S,) that a population of `size` begins with, most important first: uniform and the shapes."""
    yield space.uniform()
    yield from shapes(space)


@designed.register
def _(space: PlanSpace, rng: np.random.Generator, size: int) -> Iterator[list[int]]:
    """Yield the starts, the uniform plan, evenly spaced plans at higher levels, and neighbours of the starts.

    The neighbours are one mutation away; the starts take turns. They leave a quarter of the population to random plans.
    """
    yield from map(list, space.starts)
    yield space.uniform()
    for level in dict.fromkeys(space.allowed[i * (len(space.allowed) - 1) // MIXES] for i in range(1, MIXES + 1)):
        if (plan := space.evenly_spaced(level)) is not None:
            yield space.spend(plan, np.random.default_rng(level))
    mutate = MUTATIONS.bind(MUTATIONS.default(space), 1, space=space, rng=rng)
    for start in itertools.islice(itertools.cycle(space.starts), max(size * 3 // 4 - len(space.starts) - MIXES - 1, 0)):
        yield mutate(list(start))[0]


def hybrid(space: SearchSpace, rng: np.random.Generator, size: int) -> list[list[int]]:
    """Build a first population of up to `size` distinct feasible genomes (S,): designed ones, then random ones.

    There are fewer when the space, or what 200 draws in a row find of it, is smaller than `size`.

    Source: the "hybrid" initial population of Diff-ES (uniform, seven shapes, random); the profiles are our own.
    """
    distinct = dict.fromkeys(map(tuple, designed(space, rng, size)))
    population = [list(levels) for levels in itertools.islice(distinct, size)]
    seen = {tuple(levels) for levels in population}
    while len(population) < size and (levels := sample_unseen(space, rng, seen)) is not None:
        seen.add(tuple(levels))
        population.append(levels)
    return population


def sample_unseen(
    space: SearchSpace, rng: np.random.Generator, seen: Container[tuple[int, ...]], tries: int = SAMPLE_TRIES
) -> list[int] | None:
    """Draw a random feasible genome (S,) that is not in `seen`; None when `tries` draws found none."""
    for _ in range(tries):
        levels = space.sample(rng)
        if tuple(levels) not in seen:
            return levels
    return None


def _swing(space: SearchSpace, profile: Callable[[float, int], float]) -> list[int]:
    """Build levels (S,) that follow a profile around the mean level, before the repair."""
    trajectory = space.visited[::-1]
    n = len(trajectory)
    swing = np.array([profile((i + 0.5) / n, i) for i in range(n)])
    swing -= swing.mean()
    swing /= max(float(np.abs(swing).max()), 1e-9)
    mean = float(np.average(space.uniform(), weights=space.steps))
    room = min(mean, space.max_level - mean)
    levels = [0] * space.n_stages
    for stage, value in zip(trajectory, swing, strict=True):
        levels[stage] = round(mean + room * float(value))
    return levels
