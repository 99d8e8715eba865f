"""All schedules of a small space, in order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from diffes.errors import DiffesError
from diffes.spaces.loop import run_search
from diffes.spaces.schedule import Stages
from diffes.spaces.space import SearchSpace
from diffes.testing import PLANS, SPACES, StrategyConformance, evaluate, separable
from search_strategies.exhaustive import Exhaustive, feasible


class TestConformance(StrategyConformance):
    name = "exhaustive"
    plans = False
    random = False


SMALL = SearchSpace.mean_sparsity(Stages.equal(3), 2, 0.5)


def test_feasible_lists_all_of_a_space() -> None:
    for label in ("unequal steps", "dense", "all pruned", "one stage", "one visited stage", "measured costs"):
        space = SPACES[label]
        every = itertools.product(range(space.max_level + 1), repeat=space.n_stages)
        assert list(feasible(space)) == [list(levels) for levels in every if space.is_feasible(levels)], label


def test_feasible_lists_all_of_a_space_without_a_budget() -> None:
    free = SearchSpace.mean_sparsity(Stages.equal(3), 2, 0.5, (1, 0, 2)).without_budget()
    assert list(feasible(free)) == [[a, 0, b] for a in range(3) for b in range(3)]


def test_every_schedule_is_asked_once_and_the_optimum_is_the_result() -> None:
    result = run_search(Exhaustive(SMALL, seed=0, batch=3), evaluate, max_evals=100)
    asked = [list(e.schedule.levels) for e in result.evaluations]
    assert asked == list(feasible(SMALL)) and len(asked) == 7
    assert result.best.fitness == max(separable(SMALL.schedule(levels)) for levels in feasible(SMALL))
    assert result.logbook.select("evaluations") == [3, 6, 7]


def test_the_limit_is_the_largest_space_that_it_takes() -> None:
    assert Exhaustive(SMALL, seed=0, limit=7).batch == 64
    with pytest.raises(DiffesError, match="more than 6 feasible schedules"):
        Exhaustive(SMALL, seed=0, limit=6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 1000}, "more than 1,000 feasible schedules"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffesError, match=message):
        Exhaustive(SPACES["paper"], seed=0, **options)


def test_plans_are_refused() -> None:
    with pytest.raises(DiffesError, match="strategy 'exhaustive' works on levels of stages"):
        Exhaustive(PLANS["plans"], seed=0)
