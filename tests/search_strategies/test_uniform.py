"""The baseline without a search."""

from __future__ import annotations

from diffes.spaces.loop import run_search
from diffes.testing import SPACES, StrategyConformance, answer, evaluate
from search_strategies.uniform import Uniform


class TestConformance(StrategyConformance):
    name = "uniform"
    searches = False
    random = False


def test_it_asks_for_the_uniform_schedule_once() -> None:
    for label, space in SPACES.items():
        strategy = Uniform(space, seed=0)
        (proposal,) = batch = strategy.ask()
        assert proposal.schedule == space.schedule(space.uniform()), label
        strategy.tell(answer(batch))
        assert strategy.ask() == []


def test_a_run_of_it_is_one_evaluation() -> None:
    result = run_search(Uniform(SPACES["paper"], seed=0), evaluate, max_evals=9)
    assert [e.schedule.levels for e in result.evaluations] == [(2,) * 10]
