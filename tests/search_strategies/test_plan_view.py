"""What the surrogate is told of plans."""

from __future__ import annotations

import time

import numpy as np
import pytest

from diffes.spaces.loop import run_search
from diffes.spaces.plan import PlanSpace
from diffes.spaces.schedule import Schedule
from diffes.spaces.strategy import Evaluation
from search_strategies.plan_view import BINS, PlanView
from search_strategies.random_search import RandomSearch
from search_strategies.surrogate import Surrogate

SPACE = PlanSpace.dense_calls([[1.0, 0.75, 0.5, 0.25]] * 32, 6)
SKIP = 4


def plan(**calls: int) -> list[int]:
    """Levels by node: `plan(n31=0)`."""
    levels = [SKIP] * 32
    for node, level in calls.items():
        levels[int(node[1:])] = level
    return levels


def test_features_are_compute_and_calls_along_the_trajectory() -> None:
    view = PlanView(SPACE)
    nothing, dense, thin, twice = view.features(
        [plan(n0=0), plan(n0=0, n30=0), plan(n0=0, n30=2), plan(n0=0, n29=2, n30=2)]
    )
    assert view.features([plan(n0=0)]).shape == (1, view.n_features) == (1, 2 * BINS)
    differs = [np.flatnonzero(~np.isclose(nothing, each)) for each in (dense, thin, twice)]
    for where in differs:
        assert {*where.tolist()} <= {BINS - 2, BINS - 1, 2 * BINS - 2, 2 * BINS - 1}
    assert dense[BINS - 1] > thin[BINS - 1] and dense[-1] == thin[-1] < twice[-1]
    assert np.allclose(np.expm1(view.features([SPACE.uniform()])), 1, atol=0.7)


def test_a_call_that_moves_a_little_looks_alike() -> None:
    view = PlanView(SPACE)
    here, near, far = view.features([plan(n14=0), plan(n15=0), plan(n25=0)])
    assert 0 < np.linalg.norm(here - near) < np.linalg.norm(here - far) / 2


def test_neighbours_are_distinct_feasible_plans() -> None:
    view, here = PlanView(SPACE), tuple(SPACE.uniform())
    around = view.neighbours(here, np.random.default_rng(0))
    assert len(around) == len(set(around)) > 3 and here not in around and all(map(SPACE.is_feasible, around))
    assert around == view.neighbours(here, np.random.default_rng(0))


def test_plans_share_the_calls_before_they_differ() -> None:
    """The state before a call is decided by its node and by the nodes and levels before it. Six calls are a run."""
    strategy = Surrogate(SPACE, seed=0)
    known = plan(n31=0, n20=1, n10=0, n5=0)
    assert strategy._price(known) == pytest.approx(4 / 6)
    strategy._tell([Evaluation(SPACE.any_schedule(known), 0.0)])
    assert strategy._price(known) == 0
    for other, fresh in (
        (plan(n31=0, n20=1, n10=0, n5=2), 1),  # the last call is another
        (plan(n31=0, n20=1, n10=0, n4=0), 2),  # the third jumps elsewhere: so is its call, in what is kept
        (plan(n31=0, n20=2, n10=0, n5=0), 3),
        (plan(n31=0, n19=1, n10=0, n5=0), 4),
        (plan(n31=0, n20=1, n10=0), 1),  # the third jumps to the end
        (plan(n30=0, n20=1, n10=0, n5=0), 4),
    ):
        assert strategy._price(other) == pytest.approx(fresh / 6), other


def damage(schedule: Schedule) -> float:
    """Error of a run: jumps count by their squared length, more at clean nodes; thin calls cost more there too."""
    called = [(node, level) for node, level in enumerate(schedule.levels) if level < SKIP][::-1]
    ends = [*(node for node, _ in called[1:]), -1]
    start = (31 - called[0][0]) ** 2
    return start + sum(
        (node - end) ** 2 * (1 + 3 * (node < 10)) + level * (9 if node < 10 else 2)
        for (node, level), end in zip(called, ends, strict=True)
    )


@pytest.mark.slow
def test_it_needs_few_evaluations_on_plans_and_little_time() -> None:
    def evaluate(schedules: object, fidelity: float = 1.0) -> list[Evaluation]:
        return [Evaluation(s, -float(np.log(damage(s))), 6) for s in schedules]  # type: ignore[attr-defined]

    strategy = Surrogate(SPACE, seed=0)
    begun = time.process_time()
    found = run_search(strategy, evaluate, max_evals=60).best.fitness
    assert time.process_time() - begun < 14 * 1.5
    by_chance = run_search(RandomSearch(SPACE, seed=0), evaluate, max_evals=60).best.fitness
    uniform = -float(np.log(damage(SPACE.schedule(SPACE.uniform()))))
    assert found > by_chance + 0.1 and found > uniform
