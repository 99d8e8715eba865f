"""Plans that an evolution on forecasts finds: thousands of them are tried, and the denoiser is not called."""

from __future__ import annotations

from dataclasses import replace

from diffes.search.carried import Trajectory
from diffes.search.plan import PlanSpace
from diffes.search.strategy import STRATEGIES, Evaluation

BATCH = 16
EVOLUTION = f"evolution:mu=4,lam={BATCH},initial={4 * BATCH}"
FORECASTS = 25 / 32  # of an evolution, times the square of the number of nodes; at least ten batches
CAUTION = (0.02, 0.005, 0.1)  # weights of what errors come to if none cancels another


def evolved(run: Trajectory, space: PlanSpace) -> list[tuple[int, ...]]:
    """Distinct plans (N,), each the best forecast of an evolution of its own: starts of a search.

    The evolutions differ in how far they trust that errors cancel, and in whether they begin with the starts of the
    space. The programme of `carried` goes on with one partial plan for each node and cost and may miss such plans.

    Args:
        run: what is foretold.
        space: the feasible plans, of as many nodes and levels.
    """
    begins = [space, replace(space, starts=())] if space.starts else [space]
    found = [_best(run, begin, caution, seed) for caution in CAUTION for seed, begin in enumerate(begins)]
    return list(dict.fromkeys(found))


def _best(run: Trajectory, space: PlanSpace, caution: float, seed: int) -> tuple[int, ...]:
    """The fittest plan of an evolution, which ends early where everything around its survivors was tried."""
    strategy = STRATEGIES.make(EVOLUTION, space, seed=seed)
    tried, exhausted = 0, False
    while tried < max(FORECASTS * space.n_stages**2, 10 * BATCH) and not exhausted and (batch := strategy.ask()):
        errors = run.errors([each.schedule.levels for each in batch], caution).tolist()
        strategy.tell([Evaluation(each.schedule, -error, 0, 0.0) for each, error in zip(batch, errors, strict=True)])
        tried += len(batch)
        exhausted = any(each.origin and each.origin.operator == "random" for each in batch)
    assert strategy.best is not None
    return strategy.best.schedule.levels
