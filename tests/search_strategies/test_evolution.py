"""The paper's search: an elitist evolution that measures nothing twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from diffes.errors import DiffesError
from diffes.spaces.genome import Genome, Origin
from diffes.spaces.initial import hybrid
from diffes.spaces.loop import run_search
from diffes.spaces.operators import MUTATIONS, mutation
from diffes.spaces.schedule import Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import STRATEGIES, Evaluation
from diffes.testing import PLANS, SPACES, StrategyConformance, answer, evaluate, trace
from search_strategies.evolution import Evolution

PAPER = SPACES["paper"]


class TestConformance(StrategyConformance):
    name = "evolution"


class TestOfThePaper(StrategyConformance):
    name = "evolution:mu=4,lam=16"


class TestWithACrossover(StrategyConformance):
    name = "evolution:mu=4,lam=8,crossover=level_exchange"


class TestWithOperatorsOfDeap(StrategyConformance):
    name = "evolution:mutation=deap.mutUniformInt:indpb=0.2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mu": 0}, "mu must be at least 1, got 0"),
        ({"lam": -1}, "lam must be at least 1, got -1"),
        ({"initial": 0}, "initial must be at least 1, got 0"),
        ({"mu": 1.5}, "mu must be a whole number, got 1.5"),
        ({"mutation": "nothing"}, "unknown mutation 'nothing'"),
        ({"mutation": "level_switch:moves=1"}, "moves"),
        ({"crossover": "nothing"}, "unknown crossover 'nothing'"),
        ({"crossover_rate": 2}, r"crossover_rate must be in \[0, 1\], got 2"),
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffesError, match=message):
        Evolution(PAPER, seed=0, **options)


def test_an_option_of_a_wrong_type_is_named() -> None:
    with pytest.raises(DiffesError, match="wrong type"):
        STRATEGIES.make("evolution:crossover_rate=x", PAPER, seed=0)


def test_it_begins_with_a_hybrid_population() -> None:
    batch = Evolution(PAPER, seed=3, initial=12).ask()
    assert [list(p.schedule.levels) for p in batch] == hybrid(PAPER, np.random.default_rng(3), 12)
    assert [p.origin for p in batch] == [None] * 12


def test_it_keeps_the_best_mu_of_parents_and_offspring() -> None:
    strategy = Evolution(PAPER, seed=0, mu=3, lam=5, initial=6)
    scores: dict[tuple[int, ...], float] = {}
    for size in (6, 5, 5, 5):
        batch = strategy.ask()
        assert len(batch) == size
        evaluations = answer(batch)
        scores |= {e.schedule.levels: e.fitness for e in evaluations}
        strategy.tell(evaluations)
        best = sorted(scores, key=lambda levels: scores[levels], reverse=True)[:3]
        assert [tuple(genome) for genome in strategy._survivors] == best


def test_every_child_is_of_a_survivor() -> None:
    strategy = Evolution(PAPER, seed=0, mu=3, lam=30, initial=6)
    strategy.tell(answer(strategy.ask()))
    for _ in range(3):
        survivors = {tuple(genome) for genome in strategy._survivors}
        batch = strategy.ask()
        found = [proposal.origin for proposal in batch if proposal.origin is not None]
        assert len(found) == 30 and {origin.operator for origin in found} == {"level_switch"}
        assert {parent for origin in found for parent in origin.parents} == survivors
        strategy.tell(answer(batch))


def test_ties_are_broken_by_age() -> None:
    strategy = Evolution(PAPER, seed=0)
    first = strategy.ask()
    strategy.tell([Evaluation(proposal.schedule, 1.0) for proposal in first])
    strategy.tell([Evaluation(proposal.schedule, 1.0) for proposal in strategy.ask()])
    assert [tuple(genome) for genome in strategy._survivors] == [proposal.schedule.levels for proposal in first[:2]]


def test_a_mutation_that_does_nothing_falls_back_to_random_samples() -> None:
    @mutation("nothing")
    def nothing(genome: Genome, *, space: SearchSpace, rng: np.random.Generator) -> tuple[Genome]:
        return (genome,)

    try:
        asked = trace(Evolution(PAPER, seed=0, mutation="nothing"))
    finally:
        MUTATIONS.unregister("nothing")
    assert len(set(asked)) == len(asked) == 48


def test_all_of_a_small_space_is_visited() -> None:
    space = SearchSpace.mean_sparsity(Stages.equal(3), 2, 0.5)
    assert len(run_search(Evolution(space, seed=0), evaluate, max_evals=100).evaluations) == 7


def origins(strategy: Evolution, n: int) -> list[Origin]:
    """Of the first n schedules that were made from others."""
    found: list[Origin] = []
    while len(found) < n:
        batch = strategy.ask()
        found += [proposal.origin for proposal in batch if proposal.origin is not None]
        strategy.tell(answer(batch))
    return found[:n]


def test_a_crossover_has_two_parents() -> None:
    found = origins(Evolution(PAPER, seed=0, mu=4, crossover="level_exchange", crossover_rate=1), 40)
    assert {origin.operator for origin in found} == {"level_exchange + level_switch"}
    assert {len(set(origin.parents)) for origin in found} == {2}
    assert {len(parent) for origin in found for parent in origin.parents} == {10}


def test_plans_are_varied_by_their_own_operators() -> None:
    space = PLANS["plans"]
    assert {o.operator for o in origins(Evolution(space, seed=0), 40)} == {"plan_move"}
    crossed = Evolution(space, seed=0, mu=4, crossover="node_exchange", crossover_rate=1)
    assert {o.operator for o in origins(crossed, 20)} == {"node_exchange + plan_move"}
    named = Evolution(space, seed=0, mutation="move_call:max_shift=2")
    assert {o.operator for o in origins(named, 20)} == {"move_call:max_shift=2"}


def test_starts_of_a_space_are_asked_first_and_improved() -> None:
    start = (5,) * 12 + (0, 0, 0, 0)
    space = replace(PLANS["plans"], starts=(start,))
    strategy = Evolution(space, seed=0)
    assert strategy.ask()[0].schedule.levels == start


def test_the_crossover_rate_counts_only_where_there_is_a_crossover() -> None:
    assert {o.operator for o in origins(Evolution(PAPER, seed=0, crossover_rate=1), 40)} == {"level_switch"}
    never = Evolution(PAPER, seed=0, crossover="level_exchange", crossover_rate=0)
    assert {o.operator for o in origins(never, 40)} == {"level_switch"}
    both = Evolution(PAPER, seed=0, mu=4, crossover="deap.cxTwoPoint")
    assert {o.operator for o in origins(both, 40)} == {"level_switch", "deap.cxTwoPoint + level_switch"}
