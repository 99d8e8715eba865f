"""Variation step of the evolutionary strategies, and the DEAP toolbox that it works on."""

from __future__ import annotations

from collections.abc import Sequence, Set

import numpy as np
from deap import base, tools

from diffes.spaces.genome import Genome, Origin
from diffes.spaces.initial import hybrid, sample_unseen
from diffes.spaces.operators import CROSSOVERS, MUTATIONS, BoundOperator
from diffes.spaces.space import SearchSpace

MUTATION_TRIES = 20


def make_toolbox(
    space: SearchSpace, rng: np.random.Generator, *, mutate: str | None = None, mate: str | None = None
) -> base.Toolbox:
    """Make a DEAP toolbox for a space, complete but for `evaluate`.

    `individual()` draws a random feasible genome, `population(n=16)` makes a hybrid first population, `mutate(genome)`
    and `mate(one, other)` keep the budget, `select(genomes, k)` takes the k fittest, the earlier of equals; `clone` and
    `map` are DEAP's own.

    Args:
        space: the feasible schedules.
        rng: source of all random draws.
        mutate: a registered mutation or one of DEAP's, with options after a colon: "level_switch:max_moves=3",
            "deap.mutUniformInt:indpb=0.2"; when left out, the default of the space (see `default_of`).
        mate: a crossover, likewise.

    Raises:
        DiffesError: a name is unknown, or an operator takes no such options.
    """
    toolbox = base.Toolbox()
    toolbox.register("individual", _individual, space, rng)
    toolbox.register("population", _population, space, rng)
    toolbox.register("mutate", BoundOperator(MUTATIONS, mutate or MUTATIONS.default(space), space, rng))
    toolbox.register("mate", BoundOperator(CROSSOVERS, mate or CROSSOVERS.default(space), space, rng))
    toolbox.register("select", tools.selBest)
    return toolbox


def _individual(space: SearchSpace, rng: np.random.Generator) -> Genome:
    """Draw a random feasible genome (S,)."""
    return Genome(space.sample(rng))


def _population(space: SearchSpace, rng: np.random.Generator, n: int = 16) -> list[Genome]:
    """Make a hybrid first population of up to n distinct feasible genomes (S,)."""
    return [Genome(levels) for levels in hybrid(space, rng, n)]


def vary(
    parents: Sequence[Genome],
    toolbox: base.Toolbox,
    lambda_: int,
    *,
    space: SearchSpace,
    rng: np.random.Generator,
    seen: Set[tuple[int, ...]],
    cxpb: float = 0.0,
) -> list[Genome]:
    """Make `lambda_` distinct children that were never seen; fewer, or none, where no more are found.

    Each child is a random parent, crossed with another one with probability `cxpb`, and then mutated until it is new.
    When 20 mutations in a row lead to nothing new, a random schedule takes its place.

    Args:
        parents: measured genomes, at least one.
        toolbox: its `clone`, `mate` and `mutate` are used.
        lambda_: number of children.
        space: random schedules are drawn from it.
        rng: draws the parents, and whether they are crossed.
        seen: levels (S,) of schedules that are not new.
        cxpb: probability of a crossover, in [0, 1].

    Source: modelled on DEAP's `varOr`, which draws from Python's global `random`. There an offspring is crossed or
    mutated, not both, and may repeat what was measured.
    """
    children: dict[tuple[int, ...], Genome] = {}
    while len(children) < lambda_:
        taken = seen | children.keys()
        child = _child(parents, toolbox, rng, taken, cxpb)
        if tuple(child) in taken:  # few new genomes are left near the parents
            levels = sample_unseen(space, rng, taken)
            if levels is None:
                break
            child = Genome(levels, origin=Origin("random"))
        children[tuple(child)] = child
    return list(children.values())


def _child(
    parents: Sequence[Genome], toolbox: base.Toolbox, rng: np.random.Generator, taken: Set[tuple[int, ...]], cxpb: float
) -> Genome:
    parent = parents[int(rng.integers(len(parents)))]
    child = toolbox.clone(parent)
    others = [genome for genome in parents if genome is not parent]
    if cxpb > 0 and others and rng.random() < cxpb:
        other = others[int(rng.integers(len(others)))]
        child, _ = toolbox.mate(child, toolbox.clone(other))
    for _ in range(MUTATION_TRIES):
        (child,) = toolbox.mutate(child)
        if tuple(child) not in taken:
            break
    return child
