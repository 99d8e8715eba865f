"""The books that `Strategy` keeps for its subclasses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from diffes.errors import DiffesError
from diffes.spaces.genome import Origin
from diffes.spaces.schedule import Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import Evaluation, Proposal, Strategy, measurement_key

SPACE = SearchSpace.mean_sparsity(Stages.equal(3), 4, 0.5)
FIRST = [[2, 2, 2], [1, 2, 3], [3, 2, 1]]


class Scripted(Strategy):
    """Asks for given batches and notes what it learns."""

    def __init__(self, batches: list[list[list[int]]]) -> None:
        super().__init__(SPACE, seed=0)
        self.batches = list(batches)
        self.learnt: list[list[float]] = []

    def _ask(self) -> list[Proposal]:
        return [self.propose(levels) for levels in self.batches.pop(0)] if self.batches else []

    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        self.learnt.append([evaluation.fitness for evaluation in evaluations])


class Explorer(Scripted):
    explores = True


class Rungs(Scripted):
    """Asks for each schedule on half of the probes, then on all of them."""

    def _ask(self) -> list[Proposal]:
        batch = super()._ask()
        return [self.propose(p.schedule.levels, fidelity=fidelity) for p in batch for fidelity in (0.5, 1.0)]


def measured(proposal: Proposal, fitness: float) -> Evaluation:
    return Evaluation(proposal.schedule, fitness, fidelity=proposal.fidelity)


def test_results_reach_the_subclass_once_complete_and_in_the_order_asked() -> None:
    strategy = Scripted([FIRST])
    a, b, c = strategy.ask()
    strategy.tell([measured(c, 3.0)])
    assert strategy.learnt == []
    strategy.tell([measured(b, 2.0), measured(a, 1.0)])
    assert strategy.learnt == [[1.0, 2.0, 3.0]]


def test_best_is_the_first_of_equals_and_kept_over_batches() -> None:
    strategy = Scripted([FIRST, [[0, 2, 4]]])
    a, b, c = strategy.ask()
    assert strategy.best is None
    strategy.tell([measured(c, 5.0), measured(b, 5.0), measured(a, -math.inf)])
    assert strategy.best == measured(b, 5.0)
    (d,) = strategy.ask()
    strategy.tell([measured(d, 4.0)])
    assert strategy.best == measured(b, 5.0)


def test_best_is_within_the_budget_and_on_all_probes() -> None:
    explorer = Explorer([[[0, 0, 0], [2, 2, 2], [4, 4, 4]]])
    dear, exact, cheap = explorer.ask()
    explorer.tell([measured(dear, 9.0), measured(exact, 1.0), measured(cheap, 2.0)])
    assert explorer.best == measured(cheap, 2.0)
    rungs = Rungs([FIRST[:1]])
    half, whole = rungs.ask()
    rungs.tell([measured(half, 9.0), measured(whole, 1.0)])
    assert rungs.best == measured(whole, 1.0)


def test_asking_with_open_schedules_is_refused() -> None:
    strategy = Scripted([FIRST, FIRST])
    a, _, _ = strategy.ask()
    strategy.tell([measured(a, 1.0)])
    with pytest.raises(DiffesError, match="2 schedules of the last batch have no result yet"):
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
        strategy.tell([measured(a, 1.0), measured(b, math.nan)])
    strategy.tell([measured(a, 1.0)])
    other = Evaluation(SPACE.schedule([0, 2, 4]), 1.0)
    elsewhere = Evaluation(b.schedule, 1.0, fidelity=0.5)
    for evaluations in ([measured(a, 1.0)], [other], [elsewhere], [measured(b, 1.0), measured(b, 1.0)]):
        with pytest.raises(DiffesError, match="told before, or never asked for"):
            strategy.tell(evaluations)
    strategy.tell([measured(b, 1.0), measured(c, 1.0)])
    assert strategy.learnt == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("batch", "message"),
    [([[2, 2, 2], [2, 2, 2]], "twice"), ([[2, 2, 1]], "budget"), ([[2, 2]], "one level per stage")],
)
def test_a_subclass_that_breaks_the_contract_is_refused(batch: list[list[int]], message: str) -> None:
    with pytest.raises(DiffesError, match=message):
        Scripted([batch]).ask()


def test_an_explorer_may_ask_for_what_is_off_the_budget() -> None:
    assert [p.schedule.levels for p in Explorer([[[2, 2, 1], [4, 4, 4]]]).ask()] == [(2, 2, 1), (4, 4, 4)]
    with pytest.raises(DiffesError, match=r"whole numbers in \[0, 4\]"):
        Explorer([[[5, 0, 0]]]).ask()


def test_one_schedule_may_be_asked_at_two_fidelities() -> None:
    strategy = Rungs([FIRST[:1]])
    batch = strategy.ask()
    assert [measurement_key(p) for p in batch] == [(SPACE.schedule([2, 2, 2]), 0.5), (SPACE.schedule([2, 2, 2]), 1.0)]
    strategy.tell([measured(p, p.fidelity) for p in reversed(batch)])
    assert strategy.learnt == [[0.5, 1.0]]


def test_a_proposal_carries_its_fidelity_and_origin() -> None:
    strategy, origin = Scripted([]), Origin("swap", ((1, 2, 3),))
    assert strategy.propose([2, 2, 2]) == Proposal(SPACE.schedule([2, 2, 2]), 1.0, None)
    proposal = strategy.propose([2, 2, 2], fidelity=0.25, origin=origin)
    assert (proposal.fidelity, proposal.origin) == (0.25, origin)
    for fidelity in (0, -0.5, 1.5, math.nan):
        with pytest.raises(DiffesError, match=r"fidelity must be above 0 and at most 1"):
            strategy.propose([2, 2, 2], fidelity=fidelity)


def test_the_batch_that_a_caller_gets_is_its_own() -> None:
    strategy = Scripted([FIRST])
    batch = strategy.ask()
    told = [measured(p, 1.0) for p in batch]
    batch.clear()
    strategy.tell(told)
    assert strategy.learnt == [[1.0, 1.0, 1.0]]
