"""Crossovers, in DEAP's convention: each changes two genomes and returns them in a tuple."""

from __future__ import annotations

import numpy as np

from diffes.errors import DiffesError
from diffes.spaces.genome import Genome
from diffes.spaces.operators import default_of, mended
from diffes.spaces.plan import PlanSpace, plans_only
from diffes.spaces.space import SearchSpace


@default_of(SearchSpace)
def level_exchange(
    one: Genome, other: Genome, *, space: SearchSpace, rng: np.random.Generator, rate: float = 0.5
) -> tuple[Genome, Genome]:
    """Make two children between their parents that keep the sum of levels.

    The difference of the parents is a list of single levels to move from one stage to another. Each move is drawn with
    probability `rate`. The first child is the first parent with those moves made; the second child is the second parent
    with the same moves undone. Where the parents agree, so do the children. Plans exchange levels at the nodes that
    both call.

    Args:
        one: feasible levels (S,); changed in place.
        other: likewise.
        space: the feasible schedules.
        rng: draws the pairing and the moves.
        rate: in [0, 1]; 0 leaves the parents as they are, 1 exchanges them.

    Raises:
        DiffesError: rate is outside [0, 1].
    """
    if not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise DiffesError(f"rate must be in [0, 1], got {rate!r}")
    both = sorted(set(space.called(one)) & set(space.called(other)))
    gains = [s for s in both for _ in range(other[s] - one[s])]
    losses = [s for s in both for _ in range(one[s] - other[s])]
    for i, j in zip(rng.permutation(losses).tolist(), rng.permutation(gains).tolist(), strict=False):
        if rng.random() < rate:
            one[int(i)] -= 1
            one[int(j)] += 1
            other[int(i)] += 1
            other[int(j)] -= 1
    return mended(one, space, rng), mended(other, space, rng)


@default_of(PlanSpace)
def node_exchange(one: Genome, other: Genome, *, space: SearchSpace, rng: np.random.Generator) -> tuple[Genome, Genome]:
    """Exchange the calls of two plans at the nodes cleaner than a random cut.

    A child that would cost too much is repaired.

    Args:
        one: a feasible plan (N,); changed in place.
        other: likewise.
        space: the feasible plans.
        rng: draws the cut.

    Raises:
        DiffesError: the space is not one of plans.
    """
    plans_only(space, "node_exchange")
    if space.n_stages > 1:
        cut = int(rng.integers(1, space.n_stages))
        one[:cut], other[:cut] = other[:cut], one[:cut]
    return mended(one, space, rng), mended(other, space, rng)
