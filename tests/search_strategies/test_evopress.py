"""EvoPress: rungs of few and of all probes, and one parent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from diffes.errors import DiffesError
from diffes.spaces.initial import hybrid
from diffes.spaces.loop import run_search
from diffes.spaces.strategy import STRATEGIES, Evaluation, Proposal
from diffes.testing import PLANS, SPACES, StrategyConformance, answer, evaluate, separable
from search_strategies.evopress import EvoPress

PAPER = SPACES["paper"]


class TestConformance(StrategyConformance):
    name = "evopress"


class TestWithThreeRungs(StrategyConformance):
    name = "evopress:lam=8,fidelities=(0.25,0.5,1.0),survivors=(4,2)"


class TestWithoutRungs(StrategyConformance):
    name = "evopress:lam=8,fidelities=(1.0,),survivors=()"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": 0}, "lam must be at least 1, got 0"),
        ({"fidelities": (0.5, 0.25, 1)}, "fidelities must rise"),
        ({"fidelities": (0.25, 0.5)}, "fidelities must rise"),
        ({"fidelities": (0, 1)}, "fidelities must rise"),
        ({"fidelities": (), "survivors": ()}, "fidelities must rise"),
        ({"survivors": (4, 2)}, "fidelities must rise"),
        ({"survivors": (0,)}, "survivors must be at least 1, got 0"),
        ({"mutation": "nothing"}, "unknown mutation 'nothing'"),
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffesError, match=message):
        EvoPress(PAPER, seed=0, **options)


def test_options_may_be_tuples_and_of_a_wrong_type_are_named() -> None:
    made = STRATEGIES.make("evopress:fidelities=(0.1,0.5,1.0),survivors=(8,2),lam=9", PAPER, seed=0)
    assert (made.fidelities, made.survivors, made.lam) == ((0.1, 0.5, 1.0), (8, 2), 9)
    for spec in ("evopress:survivors=8", "evopress:fidelities=0.5"):
        with pytest.raises(DiffesError, match="wrong type"):
            STRATEGIES.make(spec, PAPER, seed=0)


def tell(strategy: EvoPress, batch: Sequence[Proposal], *fitness: float) -> None:
    """Tells each of a batch its fitness; a single one is that of all."""
    given = fitness if len(fitness) == len(batch) else fitness * len(batch)
    strategy.tell([Evaluation(p.schedule, f, fidelity=p.fidelity) for p, f in zip(batch, given, strict=True)])


def parents(batch: Sequence[Proposal]) -> set[tuple[int, ...]]:
    return {parent for proposal in batch if proposal.origin for parent in proposal.origin.parents}


def levels(batch: Sequence[Proposal]) -> list[tuple[int, ...]]:
    return [proposal.schedule.levels for proposal in batch]


def test_survivors_are_measured_on_all_probes() -> None:
    strategy = EvoPress(PAPER, seed=0, lam=8, fidelities=(0.25, 0.5, 1.0), survivors=(4, 2))
    for _ in range(3):
        sizes = []
        for fidelity in (0.25, 0.5, 1.0):
            batch = strategy.ask()
            sizes.append(len(batch))
            assert {proposal.fidelity for proposal in batch} == {fidelity}
            best = sorted(batch, key=lambda proposal: separable(proposal.schedule), reverse=True)
            strategy.tell(answer(batch))
        assert sizes == [8, 4, 2]
    assert strategy._parent is not None and strategy.best is not None
    assert strategy._parent.fitness.values == (strategy.best.fitness,)
    assert strategy.best.fitness >= separable(best[0].schedule)


def test_it_begins_with_all_starts_of_a_space_however_many() -> None:
    space = PLANS["plans"]
    starts = [tuple(space.sample(np.random.default_rng(i))) for i in range(12)]
    strategy = EvoPress(replace(space, starts=tuple(dict.fromkeys(starts))), seed=0, lam=4)
    first = strategy.ask()
    assert levels(first) == list(dict.fromkeys(starts)) and {proposal.fidelity for proposal in first} == {0.25}
    tell(strategy, first, 1.0)
    tell(strategy, strategy.ask(), 1.0)
    assert len(strategy.ask()) == 4


def test_the_fittest_go_on_from_each_rung() -> None:
    strategy = EvoPress(PAPER, seed=0, lam=8, fidelities=(0.25, 0.5, 1.0), survivors=(3, 2))
    first = strategy.ask()
    tell(strategy, first, 1.0, 7.0, 3.0, 0.0, 5.0, 2.0, 6.0, 4.0)
    second = strategy.ask()
    assert levels(second) == [first[i].schedule.levels for i in (1, 6, 4)]
    tell(strategy, second, 1.0, 3.0, 2.0)
    third = strategy.ask()
    assert levels(third) == [first[i].schedule.levels for i in (6, 4)]
    tell(strategy, third, 1.0, 2.0)
    assert parents(strategy.ask()) == {first[4].schedule.levels}


def test_of_equals_the_one_asked_first_goes_on() -> None:
    strategy = EvoPress(PAPER, seed=0, lam=8, survivors=(3,))
    first = strategy.ask()
    tell(strategy, first, 1.0)
    second = strategy.ask()
    assert levels(second) == levels(first)[:3]
    tell(strategy, second, 1.0)
    third = strategy.ask()
    assert parents(third) == {first[0].schedule.levels}
    tell(strategy, third, 0.0, 2.0, 1.0, 2.0, 2.0, 1.0, 2.0, 0.0)
    assert levels(strategy.ask()) == [third[i].schedule.levels for i in (1, 3, 4)]


@pytest.mark.parametrize("rungs", [{}, {"fidelities": (1.0,), "survivors": ()}])
@pytest.mark.parametrize(("newcomer", "replaces"), [(1.0, True), (1.5, True), (0.5, False), (-math.inf, False)])
def test_a_newcomer_as_good_as_the_parent_takes_its_place(
    rungs: dict[str, Any], newcomer: float, replaces: bool
) -> None:
    strategy = EvoPress(PAPER, seed=0, lam=8, **rungs)
    last: list[Proposal] = []
    tops = []
    for fitness in (1.0, newcomer):
        for _ in strategy.fidelities:
            last = strategy.ask()
            tell(strategy, last, fitness)
        tops.append(last[0].schedule.levels)
    assert tops[0] != tops[1]
    assert parents(strategy.ask()) == {tops[replaces]}


def test_few_probes_do_not_make_a_parent() -> None:
    """The parent is compared on all probes, whatever its score on a few was."""
    strategy = EvoPress(PAPER, seed=0, lam=4, survivors=(1,))
    tell(strategy, strategy.ask(), 100.0)
    (parent,) = batch = strategy.ask()
    tell(strategy, batch, 1.0)
    tell(strategy, strategy.ask(), 50.0)
    tell(strategy, strategy.ask(), 0.5)
    assert parents(strategy.ask()) == {parent.schedule.levels}


def test_it_begins_with_a_hybrid_population_and_goes_on_with_small_moves() -> None:
    strategy = EvoPress(PAPER, seed=3, lam=6)
    first = strategy.ask()
    assert [list(genome) for genome in levels(first)] == hybrid(PAPER, np.random.default_rng(3), 6)
    tell(strategy, first, 1.0)
    survivors = strategy.ask()
    tell(strategy, survivors, 1.0)
    offspring = strategy.ask()
    assert {proposal.origin.operator for proposal in offspring if proposal.origin} == {"level_switch_small"}
    assert not set(levels(offspring)) & set(levels(first)) and len(offspring) == 6
    moved = [sum(map(abs, np.subtract(each, levels(survivors)[0]))) for each in levels(offspring)]
    assert max(moved) <= 6 < 60  # three moves of one level


def test_offspring_keep_their_origin_from_rung_to_rung() -> None:
    strategy = EvoPress(PAPER, seed=0, lam=8)
    for _ in range(2):
        tell(strategy, strategy.ask(), 1.0)
    few = strategy.ask()
    tell(strategy, few, 1.0)
    assert [p.origin for p in strategy.ask()] == [p.origin for p in few[:4]]


def test_few_probes_cost_a_part_of_an_evaluation() -> None:
    result = run_search(EvoPress(PAPER, seed=0), evaluate, max_evals=24)
    assert sum(e.fidelity for e in result.evaluations) == 24.0
    assert [e.fidelity for e in result.evaluations] == ([0.25] * 16 + [1.0] * 4) * 3
