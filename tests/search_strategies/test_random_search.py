"""The baseline that a search has to beat."""

from __future__ import annotations

import pytest

from diffes.errors import DiffesError
from diffes.spaces.loop import run_search
from diffes.spaces.schedule import Stages
from diffes.spaces.space import SearchSpace
from diffes.testing import SPACES, StrategyConformance, answer, evaluate
from search_strategies.random_search import RandomSearch


class TestConformance(StrategyConformance):
    name = "random"


def test_a_batch_of_less_than_one_is_refused() -> None:
    with pytest.raises(DiffesError, match="batch must be at least 1, got 0"):
        RandomSearch(SPACES["paper"], seed=0, batch=0)


def test_batches_are_as_large_as_asked_for() -> None:
    strategy = RandomSearch(SPACES["paper"], seed=0, batch=5)
    for _ in range(3):
        batch = strategy.ask()
        assert len(batch) == 5
        strategy.tell(answer(batch))


def test_all_of_a_small_space_is_visited_once() -> None:
    space = SearchSpace.mean_sparsity(Stages.equal(3), 2, 0.5)
    result = run_search(RandomSearch(space, seed=0), evaluate, max_evals=100)
    assert len({e.schedule for e in result.evaluations}) == len(result.evaluations) == 7
