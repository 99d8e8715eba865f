"""Genomes and the operators on them, in DEAP's convention: a mutation changes a genome and returns it in a tuple."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from deap import base, tools

from diffes.errors import DiffesError, at_least, unknown_name
from diffes.registry import Registry
from diffes.space import SearchSpace


class Fitness(base.Fitness):  # type: ignore[misc]  # DEAP has no type hints
    """One score, higher is better. NaN is refused: in DEAP's comparisons it would beat every number."""

    weights = (1.0,)

    def _set_values(self, values: Sequence[float]) -> None:
        if any(math.isnan(value) for value in values):
            raise DiffesError("fitness must not be NaN: give -inf to a genome that failed")
        self.setValues(values)

    values = property(base.Fitness.getValues, _set_values, base.Fitness.delValues)


class Genome(list[int]):
    """Levels (S,) of a schedule with their `fitness`, which is empty until it is set."""

    def __init__(self, levels: Iterable[int] = ()) -> None:
        super().__init__(levels)
        self.fitness = Fitness()


Mutation = Callable[..., tuple[Genome]]
MUTATIONS: Registry[Mutation] = Registry("mutation", "diffes.mutations")
SELECTIONS: dict[str, Callable[..., list[Genome]]] = {"best": tools.selBest}


def mutation(name: str) -> Callable[[Mutation], Mutation]:
    """Decorator that registers `function(genome, *, space, rng, **params) -> (genome,)` under a name.

    The function maps feasible genomes to feasible ones, may change the genome it is given, and draws from `rng` only.
    """
    return MUTATIONS.register(name)


@mutation("level_switch")
def level_switch(
    genome: Genome, *, space: SearchSpace, rng: np.random.Generator, max_moves: int = 5, max_levels: int = 2
) -> tuple[Genome]:
    """Shifts a few levels between pairs of stages.

    `n = min(U{1..m}, U{1..m})` moves; each draws two distinct visited stages i and j and an amount `a` in `U{1..A}`,
    and shifts `min(a, L_i, H - L_j)` levels from i to j. That keeps the sum of levels, hence the budget where steps are
    equal and costs linear; in other spaces a genome that left the budget is repaired. A genome of a single visited
    stage stays as it is.

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
    visited = space.visited
    if len(visited) < 2:
        return (genome,)
    for _ in range(int(rng.integers(1, max_moves + 1, 2).min())):
        i, j = (int(stage) for stage in rng.choice(visited, 2, replace=False))
        shift = min(int(rng.integers(1, max_levels + 1)), genome[i], space.max_level - genome[j])
        genome[i] -= shift
        genome[j] += shift
    if not space.is_feasible(genome):
        genome[:] = space.repair(genome, rng)
    return (genome,)


def make_toolbox(
    space: SearchSpace,
    rng: np.random.Generator,
    *,
    mutate: str = "level_switch",
    select: str = "best",
    **mutate_params: Any,
) -> base.Toolbox:
    """A DEAP toolbox with `mutate(genome)`, `select(genomes, k)` and `clone(genome)`.

    Args:
        space: the feasible schedules.
        rng: what the mutation draws from.
        mutate: name of a registered mutation.
        select: name of a selection; "best" takes the k fittest, of equals the earlier ones.
        mutate_params: further keyword arguments of the mutation.

    Raises:
        DiffesError: a name is unknown, or the mutation takes no such parameters.
    """
    function = MUTATIONS.get(mutate)
    if select not in SELECTIONS:
        raise unknown_name("selection", select, SELECTIONS)
    try:
        inspect.signature(function).bind(Genome(), space=space, rng=rng, **mutate_params)
    except TypeError as error:
        raise DiffesError(f"mutation {mutate!r} cannot be called with {mutate_params}: {error}") from error
    toolbox = base.Toolbox()
    toolbox.register("mutate", function, space=space, rng=rng, **mutate_params)
    toolbox.register("select", SELECTIONS[select])
    return toolbox
