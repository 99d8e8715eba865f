"""NSGA-II: the front of fitness and cost, and who may have offspring."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from diffes.errors import DiffesError
from diffes.spaces.loop import run_search
from diffes.spaces.schedule import Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import Evaluation, Proposal
from diffes.testing import PLANS, SPACES, StrategyConformance, evaluate, separable
from search_strategies.nsga2 import Nsga2

PAPER = SPACES["paper"]
EIGHT = SearchSpace.mean_sparsity(Stages.equal(6), 7, 0.5)  # a first population of eight constants is all there is
Levels = tuple[int, ...]


class TestConformance(StrategyConformance):
    name = "nsga2"


class TestASmallPopulation(StrategyConformance):
    name = "nsga2:mu=6,lam=5,mutation=swap_stages"
    searches = False  # half of the mutations only exchange levels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mu": 3}, "mu must be at least 4, got 3"),
        ({"lam": 0}, "lam must be at least 1, got 0"),
        ({"crossover_rate": -0.1}, r"crossover_rate must be in \[0, 1\], got -0.1"),
        ({"mutation": "nothing"}, "unknown mutation 'nothing'"),
        ({"crossover": "nothing"}, "unknown crossover 'nothing'"),
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffesError, match=message):
        Nsga2(PAPER, seed=0, **options)


def test_it_finds_a_front_and_a_result_within_the_budget() -> None:
    result = run_search(Nsga2(PAPER, seed=0), evaluate, max_evals=300)
    front = result.front(PAPER)
    costs = [PAPER.cost(e.schedule.levels) for e in front]
    assert PAPER.budget is not None
    assert costs == sorted(set(costs)) and len(front) > 10
    assert costs[0] < PAPER.budget < costs[-1]
    assert PAPER.cost(result.best.schedule.levels) <= PAPER.budget
    assert result.best in front
    assert result.best.fitness > separable(PAPER.schedule(PAPER.uniform()))


def test_it_begins_with_a_constant_schedule_of_every_level() -> None:
    asked = [p.schedule.levels for p in Nsga2(EIGHT, seed=0, mu=8).ask()]
    assert asked == [(level,) * 6 for level in range(8)]
    more = [p.schedule.levels for p in Nsga2(EIGHT, seed=0, mu=12).ask()]
    assert more[:8] == asked and len(set(more)) == 12 and all(map(EIGHT.is_feasible, more[8:]))
    assert len(Nsga2(EIGHT, seed=0, mu=4).ask()) == 8
    unvisited = SearchSpace.mean_sparsity(Stages.equal(3), 2, 0.5, (1, 0, 2))
    assert [p.schedule.levels for p in Nsga2(unvisited, seed=0, mu=4).ask()][:3] == [(0, 0, 0), (1, 0, 1), (2, 0, 2)]


def offspring(fitness: Callable[[int], float], seed: int = 0, **options: Any) -> list[Proposal]:
    """Sixty-four children of the eight constants, each of the fitness given for its level."""
    strategy = Nsga2(EIGHT, seed=seed, mu=8, lam=64, **options)
    first = strategy.ask()
    assert [proposal.schedule.levels[0] for proposal in first] == list(range(8))
    strategy.tell([Evaluation(proposal.schedule, fitness(proposal.schedule.levels[0])) for proposal in first])
    return strategy.ask()


def parents(batch: Sequence[Proposal]) -> collections.Counter[int]:
    """How often a constant of each level was a parent."""
    return collections.Counter(parent[0] for p in batch if p.origin for parent in p.origin.parents)


def parents_of_all(fitness: Callable[[int], float]) -> list[collections.Counter[int]]:
    """Of eight seeds."""
    return [parents(offspring(fitness, seed, crossover_rate=0.0)) for seed in range(8)]


def test_who_is_dominated_by_all_has_no_offspring() -> None:
    """Cheaper is fitter: a total order, in which level 7 wins its two tournaments and level 0 loses both."""
    found = parents_of_all(float)
    assert min(sum(each.values()) for each in found) > 50
    assert [each[0] for each in found] == [0] * 8
    assert min(each[7] for each in found) > 0
    total = sum(found, collections.Counter[int]())
    assert total[7] > total[5] > total[3] > total[1] > 0


def test_of_those_that_do_not_dominate_each_other_the_least_crowded_have_offspring() -> None:
    """Denser is fitter, so all are on the front. Its ends are not crowded at all; level 6 is the most crowded.

    The neighbours of levels 1 to 6 are 24, 20, 16, 12, 8 and 4 apart in fitness, and all the same in cost.
    """
    found = parents_of_all(lambda level: float((7 - level) ** 2))
    assert min(sum(each.values()) for each in found) > 50
    assert [each[6] for each in found] == [0] * 8
    assert min(each[end] for each in found for end in (0, 7)) > 0
    total = sum(found, collections.Counter[int]())
    assert min(total[0], total[7]) > total[2] > total[5] and total[1] > total[4] > 0


def test_the_population_is_in_order_of_fronts_each_with_its_own_crowding() -> None:
    """Level 0 is at the end of what there is, but level 1 is cheaper and fitter; the others are a front."""
    scores = [5.55, 6.0, 5.9, 5.8, 5.7, 5.6, 5.5, 5.4]
    strategy = Nsga2(EIGHT, seed=0, mu=8, lam=64, crossover_rate=0.0)
    strategy.tell([Evaluation(p.schedule, scores[p.schedule.levels[0]]) for p in strategy.ask()])
    crowding = {genome[0]: genome.fitness.crowding_dist for genome in strategy._population}
    assert crowding[0] == float("inf")  # alone on its front
    assert crowding[1] == crowding[7] == float("inf") and max(crowding[level] for level in range(2, 7)) < 1
    assert [genome[0] for genome in strategy._population][-1] == 0


def survivors(scores: dict[int, float], mu: int = 4) -> set[int]:
    strategy = Nsga2(EIGHT, seed=0, mu=mu)
    strategy.tell([Evaluation(p.schedule, scores[p.schedule.levels[0]]) for p in strategy.ask()])
    return {genome[0] for genome in strategy._population}


def test_the_population_keeps_what_nothing_dominates() -> None:
    """The fittest is level 3; of the denser ones none is fitter, of the cheaper ones only 5, 6 and 7 are a choice."""
    assert survivors({0: 1.0, 1: 2.0, 2: 3.0, 3: 9.0, 4: 0.0, 5: 8.0, 6: 7.0, 7: 6.0}) == {3, 5, 6, 7}


def test_the_population_keeps_the_ends_and_the_least_crowded() -> None:
    """All on the front: both ends, then those with the widest gaps around them."""
    assert survivors({level: float((7 - level) ** 2) for level in range(8)}) == {0, 7, 1, 2}


def test_failures_do_not_survive_and_have_no_offspring() -> None:
    scores = {level: -np.inf if level % 2 else float(10 - level) for level in range(8)}
    assert survivors(scores) == {0, 2, 4, 6}


def test_offspring_with_two_parents_have_two_different_ones() -> None:
    batch = offspring(lambda level: float((7 - level) ** 2), crossover_rate=1.0)
    found = [p.origin for p in batch if p.origin is not None]
    assert {len(set(origin.parents)) for origin in found} == {2} and len(found) == 64
    assert {origin.operator for origin in found} == {
        "level_exchange + level_switch", "level_exchange + level_switch + level_step",
    }  # fmt: skip


def test_half_of_the_mutations_also_step() -> None:
    """Those that only switch levels cost as much as their parent, as steps and costs are equal here."""
    batch = offspring(lambda level: float((7 - level) ** 2), crossover_rate=0.0)
    made = [(sum(p.schedule.levels), p.origin) for p in batch if p.origin and p.origin.parents]
    inner = [(levels, o) for levels, o in made if 0 < o.parents[0][0] < 7]  # at the ends there is nothing to switch
    operators = collections.Counter(origin.operator for _, origin in inner)
    assert set(operators) == {"level_switch", "level_switch + level_step"} and len(inner) > 20
    assert len(inner) / 4 < operators["level_switch"] < len(inner) * 3 / 4
    switched = [levels - sum(o.parents[0]) for levels, o in inner if o.operator == "level_switch"]
    stepped = [levels - sum(o.parents[0]) for levels, o in inner if o.operator != "level_switch"]
    assert set(switched) == {0}
    assert min(stepped) < 0 < max(stepped)


def test_offspring_are_new() -> None:
    strategy = Nsga2(EIGHT, seed=0, mu=8, lam=20)
    asked: list[Levels] = []
    for _ in range(6):
        batch = strategy.ask()
        asked += [p.schedule.levels for p in batch]
        strategy.tell([Evaluation(p.schedule, separable(p.schedule)) for p in batch])
    assert len(asked) == len(set(asked)) == 8 + 5 * 20


def test_the_tournaments_draw_from_the_seed_only() -> None:
    before = random.getstate()
    first = offspring(lambda level: float(level), crossover_rate=0.5)
    assert random.getstate() == before
    random.seed(4)
    try:
        assert offspring(lambda level: float(level), crossover_rate=0.5) == first
        assert offspring(lambda level: float(level), 1, crossover_rate=0.5) != first
    finally:
        random.setstate(before)


def test_a_front_of_plans_is_of_many_costs() -> None:
    space = PLANS["plans"]
    strategy = Nsga2(space, seed=0)
    first = strategy.ask()
    constants = space.constants()
    assert [list(p.schedule.levels) for p in first[: len(constants)]] == constants
    result = run_search(Nsga2(space, seed=0), evaluate, max_evals=150)
    costs = [space.cost(e.schedule.levels) for e in result.evaluations]
    assert space.budget is not None and min(costs) < space.budget / 2 and max(costs) > 2 * space.budget
    assert space.cost(result.best.schedule.levels) <= space.budget
