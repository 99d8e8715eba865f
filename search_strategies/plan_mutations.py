"""Mutations of plans: calls move, are added, dropped, split and merged, and trade levels, within the budget.

Each takes a feasible plan (N,), changes it in place and returns it in a tuple. A move that finds nothing to change
leaves the plan as it is. All raise a `DiffesError` if the space is not one of plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from diffes.errors import at_least
from diffes.spaces.genome import Genome
from diffes.spaces.operators import default_of, mended
from diffes.spaces.plan import PlanSpace, plans_only
from diffes.spaces.space import SearchSpace

T = TypeVar("T")
MAX_SHIFT = 4
TRIES = 10  # draws of `plan_move` until one changes something


def move_call(
    genome: Genome, *, space: SearchSpace, rng: np.random.Generator, max_shift: int = MAX_SHIFT
) -> tuple[Genome]:
    """Move a random call to a random skipped node near it; the call keeps its level.

    Args:
        genome: a feasible plan (N,); changed in place.
        space: the feasible plans.
        rng: draws the call and the node.
        max_shift: largest distance in nodes, at least 1.
    """
    plans = plans_only(space, "move_call")
    at_least("max_shift", max_shift, 1)
    movable = [node for node in plans.called(genome) if _near(plans, genome, node, max_shift)]
    if movable:
        node = _one(movable, rng)
        target = _one(_near(plans, genome, node, max_shift), rng)
        genome[node], genome[target] = plans.skip, genome[node]
    return (mended(genome, plans, rng),)


def trade_levels(genome: Genome, *, space: SearchSpace, rng: np.random.Generator, max_levels: int = 2) -> tuple[Genome]:
    """Make a random call cheaper and another one denser, as far as the budget then allows.

    Args:
        genome: a feasible plan (N,); changed in place.
        space: the feasible plans.
        rng: draws both calls, and by how many allowed levels each changes at most, in `U{1..max_levels}`.
        max_levels: at least 1.
    """
    plans = plans_only(space, "trade_levels")
    at_least("max_levels", max_levels, 1)
    givers = [node for node in plans.called(genome) if plans.cheaper(node, genome[node])]
    takers = [node for node in plans.called(genome) if plans.denser(genome[node])]
    pairs = [(giver, taker) for giver in givers for taker in takers if giver != taker]
    if not pairs:
        return (genome,)
    giver, taker = _one(pairs, rng)
    levels = plans.cheaper(giver, genome[giver])[: int(rng.integers(1, max_levels + 1))]
    genome[giver] = levels[-1]
    for level in plans.denser(genome[taker])[: int(rng.integers(1, max_levels + 1))]:
        trial = list(genome)
        trial[taker] = level
        if plans.affords(trial):
            genome[taker] = level
    return (mended(genome, plans, rng),)


def add_call(genome: Genome, *, space: SearchSpace, rng: np.random.Generator) -> tuple[Genome]:
    """Call a random skipped node; random other calls pay for it.

    Half of the time the new call has the level of the nearest call, else a random one.

    Args:
        genome: a feasible plan (N,); changed in place.
        space: the feasible plans.
        rng: draws the node, its level, and the calls that pay.
    """
    plans = plans_only(space, "add_call")
    skip = plans.skip
    skipped = [node for node, level in enumerate(genome) if level == skip and _payable(plans, node)]
    if skipped:
        _add(genome, plans, _one(skipped, rng), rng)
    return (mended(genome, plans, rng),)


def drop_call(genome: Genome, *, space: SearchSpace, rng: np.random.Generator) -> tuple[Genome]:
    """Drop a random call; what that frees makes others denser, half of the time after a new call elsewhere.

    A plan of one call stays as it is, and without a budget nothing is freed.

    Args:
        genome: a feasible plan (N,); changed in place.
        space: the feasible plans.
        rng: draws the call, and what takes its place.
    """
    plans = plans_only(space, "drop_call")
    called = plans.called(genome)
    if len(called) > 1:
        dropped = _one(called, rng)
        genome[dropped] = plans.skip
        elsewhere = [n for n, level in enumerate(genome) if level == plans.skip and n != dropped and _payable(plans, n)]
        if plans.budget is not None and elsewhere and rng.random() < 0.5:
            _add(genome, plans, _one(elsewhere, rng), rng)
        genome[:] = plans.spend(genome, rng)
    return (mended(genome, plans, rng),)


def split_call(
    genome: Genome, *, space: SearchSpace, rng: np.random.Generator, max_shift: int = MAX_SHIFT
) -> tuple[Genome]:
    """Replace a random call by two cheaper ones, at two nodes near it or at its own and one near it.

    The two are as alike in cost as the old call and the unspent budget can pay for. If no call can be split within the
    budget, the plan stays as it is.

    Args:
        genome: a feasible plan (N,); changed in place.
        space: the feasible plans.
        rng: draws the call and the nodes.
        max_shift: largest distance in nodes, at least 1.
    """
    plans = plans_only(space, "split_call")
    at_least("max_shift", max_shift, 1)
    for node in rng.permutation(plans.called(genome)).tolist():
        nodes = [node, *_near(plans, genome, node, max_shift)]
        if len(nodes) < 2:
            continue
        pair = [nodes[i] for i in rng.choice(len(nodes), 2, replace=False)]
        trial = list(genome)
        trial[node] = plans.skip
        levels = _halves(plans, trial, pair, plans.level_costs[node][genome[node]])
        if levels is not None:
            genome[node] = plans.skip
            genome[pair[0]], genome[pair[1]] = levels
            break
    return (mended(genome, plans, rng),)


def merge_calls(genome: Genome, *, space: SearchSpace, rng: np.random.Generator) -> tuple[Genome]:
    """Replace two neighbouring calls by one denser call, at a random node from the one to the other.

    It is as dense as both pay for. A plan of one call stays as it is.

    Args:
        genome: a feasible plan (N,); changed in place.
        space: the feasible plans.
        rng: draws the pair and the node.
    """
    plans = plans_only(space, "merge_calls")
    called = plans.called(genome)
    if len(called) > 1:
        first = int(rng.integers(len(called) - 1))
        low, high = called[first : first + 2]
        paid = plans.level_costs[low][genome[low]] + plans.level_costs[high][genome[high]]
        highest = max(genome[low], genome[high])
        node = int(rng.integers(low, high + 1))
        level = next((k for k in plans.allowed if plans.level_costs[node][k] <= paid), highest)
        genome[low] = genome[high] = plans.skip
        genome[node] = level
    return (mended(genome, plans, rng),)


MOVES: tuple[Callable[..., tuple[Genome]], ...] = (
    move_call,
    trade_levels,
    add_call,
    drop_call,
    split_call,
    merge_calls,
)


@default_of(PlanSpace)
@default_of(PlanSpace, small=True, options="max_moves=1")
def plan_move(genome: Genome, *, space: SearchSpace, rng: np.random.Generator, max_moves: int = 3) -> tuple[Genome]:
    """Make a few random moves: `n = min(U{1..m}, U{1..m})` draws of the other mutations here, all equally likely.

    A draw that finds nothing to change is repeated, up to 10 times.

    Args:
        genome: a feasible plan (N,); changed in place.
        space: the feasible plans.
        rng: draws everything.
        max_moves: m, at least 1.

    Source: the number of moves is drawn as in `level_switch`.
    """
    plans = plans_only(space, "plan_move")
    at_least("max_moves", max_moves, 1)
    for _ in range(int(rng.integers(1, max_moves + 1, 2).min())):
        before = list(genome)
        for _ in range(TRIES):
            (genome,) = _one(MOVES, rng)(genome, space=plans, rng=rng)
            if genome != before:
                break
    return (genome,)


def _one(choices: Sequence[T], rng: np.random.Generator) -> T:
    """Draw one of the choices at random."""
    return choices[int(rng.integers(len(choices)))]


def _near(plans: PlanSpace, genome: Sequence[int], node: int, max_shift: int) -> list[int]:
    """Return the skipped nodes at most `max_shift` away from a node."""
    around = range(max(node - max_shift, 0), min(node + max_shift + 1, plans.n_stages))
    return [other for other in around if genome[other] == plans.skip and other != node]


def _payable(plans: PlanSpace, node: int) -> bool:
    """Check whether the budget allows any call at this node."""
    return any(plans.pays(node, level) for level in plans.allowed)


def _add(genome: Genome, plans: PlanSpace, node: int, rng: np.random.Generator) -> None:
    """Call a node, in place, at a level that the budget allows on its own; other calls pay for it."""
    nearest = min(plans.called(genome), key=lambda other: abs(other - node))
    level = genome[nearest] if rng.random() < 0.5 else _one(plans.allowed, rng)
    chosen = next(k for k in [level, *plans.cheaper(node, level)] if plans.pays(node, k))
    genome[node] = chosen
    genome[:] = plans.pay(genome, rng, spare=(node,))


def _halves(plans: PlanSpace, genome: list[int], nodes: Sequence[int], price: int) -> tuple[int, int] | None:
    """Return the levels of two calls, each cheaper than `price`, that can be paid together; None if there are none.

    The cheaper of the two calls costs as much as possible.
    """
    a, b = (plans.level_costs[node] for node in nodes)
    left = 2 * price if plans.budget is None else plans.budget - plans.cost(genome)
    pairs = [(i, j) for i in plans.allowed for j in plans.allowed if max(a[i], b[j]) < price and a[i] + b[j] <= left]
    return max(pairs, key=lambda pair: (min(a[pair[0]], b[pair[1]]), a[pair[0]] + b[pair[1]]), default=None)
