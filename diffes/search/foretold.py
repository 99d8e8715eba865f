"""Plans that an evolution on forecasts finds: thousands of them are tried, and the denoiser is not called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from diffes.search.carried import Trajectory
from diffes.search.frontier import Floats, called
from diffes.search.genome import Genome
from diffes.search.initial import hybrid
from diffes.search.plan import PlanSpace
from diffes.search.variation import make_toolbox, vary

MU, LAMBDA = 4, 16
FORECASTS = 25 / 32  # of an evolution, times the square of the number of nodes; at least ten generations
CAUTION = (0.02, 0.005, 0.1)  # weights of what errors come to if none cancels another


def evolved(run: Trajectory, space: PlanSpace) -> list[tuple[int, ...]]:
    """Distinct plans (N,), each the best forecast of a (mu + lambda) evolution of its own: starts of a search.

    The evolutions differ in how far they trust that errors cancel, and in whether they begin with the starts of the
    space. The programme of `carried` goes on with one partial plan for each node and cost and may miss such plans.

    Args:
        run: what is foretold.
        space: the feasible plans, of as many nodes and levels.
    """
    begins = [space, replace(space, starts=())] if space.starts else [space]
    found = [
        _best(run, begin, caution, np.random.default_rng(seed))
        for caution in CAUTION
        for seed, begin in enumerate(begins)
    ]
    return list(dict.fromkeys(found))


def errors(run: Trajectory, plans: Sequence[Sequence[int]], caution: float) -> Floats:
    """Forecasts (n,) of the error of plans (N,), those of `run.predict` and a share of what their jumps do alone.

    A forecast may be small because large errors cancel each other, which is not to be trusted far: an estimate for the
    case that they do not is the sum of squares of each jump's own error, as it has grown at the end.

    Args:
        run: what is foretold.
        plans: the cleanest node first.
        caution: weight of that sum, at least 0.
    """
    paths = [called(plan, *run.costs.shape) for plan in plans]
    longest, n = max(map(len, paths)), len(run.costs)
    nodes, levels = np.full((longest + 1, len(plans)), n), np.zeros((longest, len(plans)), dtype=int)
    for column, path in enumerate(paths):
        nodes[: len(path), column], levels[: len(path), column] = zip(*path, strict=True)
    at = np.tile(run.states[0], (len(plans), 1))
    alone = np.square(run.states[nodes[0]] - run.states[0]).sum(1)
    before, computed = np.full((2, len(plans)), -1)
    clean, dense = at, at  # what was predicted last: on the way of the plan, and on the dense run
    for i, j, k in zip(nodes, nodes[1:], levels, strict=False):
        on = np.flatnonzero(i < n)
        i, j, k = i[on], j[on], k[on]
        x = run.data_at(i, k, computed[on])
        new = x + run.reaction[i, None] * (at[on] - run.states[i])
        reach = run.reach(i, j, before[on])
        off = run.step(i, j, run.states[i], x, reach, dense[on]) - run.states[j]
        ratio = run.noises[j] / run.noises[i]
        grows = ratio + (run.signals[j] - run.signals[i] * ratio) * (1 + reach) * run.reaction[i]
        moved = run.step(i, j, at[on], new, reach, clean[on])
        at, clean, dense = at.copy(), clean.copy(), dense.copy()
        at[on], clean[on], dense[on] = moved, new, run.data[i, 0]
        alone[on] = grows**2 * alone[on] + np.square(off).sum(1)
        before[on], computed[on] = i, np.where(np.isin(k, run.reusing), computed[on], i)
    return np.square(at - run.states[-1]).sum(1) + caution * alone


def _best(run: Trajectory, space: PlanSpace, caution: float, rng: np.random.Generator) -> tuple[int, ...]:
    """The fittest plan of an evolution."""
    toolbox = make_toolbox(space, rng)
    batch = [Genome(levels) for levels in hybrid(space, rng, 4 * LAMBDA)]
    survivors: list[Genome] = []
    seen: set[tuple[int, ...]] = set()
    while batch and len(seen) < max(FORECASTS * space.n_stages**2, 10 * LAMBDA):
        foretold = zip(batch, errors(run, batch, caution).tolist(), strict=True)
        survivors = toolbox.select([*survivors, *(Genome(plan, -error) for plan, error in foretold)], MU)
        seen.update(map(tuple, batch))
        if any(plan.origin and plan.origin.operator == "random" for plan in batch):
            break  # around the survivors everything was tried
        batch = vary(survivors, toolbox, LAMBDA, space=space, rng=rng, seen=seen)
    return tuple(survivors[0])
