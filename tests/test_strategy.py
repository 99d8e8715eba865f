"""The books that `Strategy` keeps for its subclasses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from diffes.errors import DiffesError
from diffes.schedule import StagePlan
from diffes.space import SearchSpace
from diffes.strategy import Evaluation, Strategy

SPACE = SearchSpace.mean_sparsity(StagePlan.equal(3), 4, 0.5)
FIRST = [[2, 2, 2], [1, 2, 3], [3, 2, 1]]


class Scripted(Strategy):
    """Asks for given batches and notes what it learns."""

    def __init__(self, batches: list[list[list[int]]]) -> None:
        super().__init__(SPACE, seed=0)
        self.batches = list(batches)
        self.learnt: list[list[float]] = []

    def _ask(self) -> list[list[int]]:
        return self.batches.pop(0) if self.batches else []

    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        self.learnt.append([evaluation.fitness for evaluation in evaluations])


def test_results_reach_the_subclass_once_complete_and_in_the_order_asked() -> None:
    strategy = Scripted([FIRST])
    a, b, c = strategy.ask()
    strategy.tell([Evaluation(c, 3.0)])
    assert strategy.learnt == []
    strategy.tell([Evaluation(b, 2.0), Evaluation(a, 1.0)])
    assert strategy.learnt == [[1.0, 2.0, 3.0]]


def test_best_is_the_first_of_equals_and_kept_over_batches() -> None:
    strategy = Scripted([FIRST, [[0, 2, 4]]])
    a, b, c = strategy.ask()
    assert strategy.best is None
    strategy.tell([Evaluation(c, 5.0), Evaluation(b, 5.0), Evaluation(a, -math.inf)])
    assert strategy.best == Evaluation(b, 5.0)
    (d,) = strategy.ask()
    strategy.tell([Evaluation(d, 4.0)])
    assert strategy.best == Evaluation(b, 5.0)


def test_asking_with_open_schedules_is_refused() -> None:
    strategy = Scripted([FIRST, FIRST])
    a, _, _ = strategy.ask()
    strategy.tell([Evaluation(a, 1.0)])
    with pytest.raises(DiffesError, match="tell the 2 open schedules"):
        strategy.ask()


def test_exhausted_strategy_asks_for_nothing() -> None:
    strategy = Scripted([])
    assert strategy.ask() == []
    strategy.tell([])
    assert strategy.ask() == []


def test_a_refused_tell_takes_nothing() -> None:
    strategy = Scripted([FIRST])
    a, b, c = strategy.ask()
    with pytest.raises(DiffesError, match="NaN"):
        strategy.tell([Evaluation(a, 1.0), Evaluation(b, math.nan)])
    strategy.tell([Evaluation(a, 1.0)])
    other = SPACE.schedule([0, 2, 4])
    for evaluations in ([Evaluation(a, 1.0)], [Evaluation(other, 1.0)], [Evaluation(b, 1.0), Evaluation(b, 1.0)]):
        with pytest.raises(DiffesError, match="not open"):
            strategy.tell(evaluations)
    strategy.tell([Evaluation(b, 1.0), Evaluation(c, 1.0)])
    assert strategy.learnt == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("batch", "message"),
    [([[2, 2, 2], [2, 2, 2]], "twice"), ([[2, 2, 1]], "budget"), ([[2, 2]], "one level per stage")],
)
def test_a_subclass_that_breaks_the_contract_is_refused(batch: list[list[int]], message: str) -> None:
    with pytest.raises(DiffesError, match=message):
        Scripted([batch]).ask()
