"""First populations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from diffes.spaces.initial import SHAPES, hybrid, sample_unseen, shapes
from diffes.spaces.plan import PlanSpace
from diffes.spaces.schedule import Stages
from diffes.spaces.space import SearchSpace

PAPER = SearchSpace.mean_sparsity(Stages.equal(10), 16, 0.5)
SMALL = SearchSpace.mean_sparsity(Stages.equal(3), 2, 0.5)  # 7 feasible schedules


@pytest.mark.parametrize(
    ("steps", "budget"),
    list(itertools.product([None, (1, 4, 2, 3, 2, 7), (0, 4, 0, 3, 5, 0), (0, 0, 5, 0, 0, 0)], [0, 0.3, 0.33, 0.5, 1])),
)
def test_everything_is_feasible_and_distinct(steps: tuple[int, ...] | None, budget: float) -> None:
    space = SearchSpace.mean_sparsity(Stages.equal(6), 8, budget, steps)
    for population in ([space.uniform()], shapes(space), hybrid(space, np.random.default_rng(0), 16)):
        assert population
        assert all(space.is_feasible(levels) for levels in population)
        assert len(set(map(tuple, population))) == len(population)


def test_the_papers_space_has_all_seven_shapes() -> None:
    found = dict(zip(SHAPES, shapes(PAPER), strict=True))
    sampled = {name: levels[::-1] for name, levels in found.items()}  # the first sampled stage first
    assert sampled["front_heavy"] == [16] * 5 + [0] * 5
    assert sampled["back_heavy"] == [0] * 5 + [16] * 5
    assert sum(sampled["middle_heavy"][3:7]) > sum(sampled["middle_heavy"][:3] + sampled["middle_heavy"][7:])
    assert sum(sampled["ends_heavy"][3:7]) == 0
    assert sampled["ramp_down"][0] > sampled["ramp_down"][4] > sampled["ramp_down"][9]
    assert sampled["ramp_up"][0] < sampled["ramp_up"][4] < sampled["ramp_up"][9]
    assert sampled["zigzag"] == [16, 0] * 5
    assert shapes(PAPER) == shapes(PAPER)


def test_hybrid_is_uniform_then_shapes_then_random() -> None:
    population = hybrid(PAPER, np.random.default_rng(0), 16)
    assert len(population) == 16
    assert population[0] == PAPER.uniform()
    assert population[1:8] == shapes(PAPER)
    assert hybrid(PAPER, np.random.default_rng(0), 16) == population
    assert hybrid(PAPER, np.random.default_rng(1), 16)[:8] == population[:8]
    assert hybrid(PAPER, np.random.default_rng(1), 16)[8:] != population[8:]
    assert hybrid(PAPER, np.random.default_rng(0), 3) == population[:3]


def test_hybrid_is_smaller_where_the_space_is() -> None:
    assert len(hybrid(SMALL, np.random.default_rng(0), 16)) == 7
    assert hybrid(SearchSpace.mean_sparsity(Stages.equal(3), 2, 1), np.random.default_rng(0), 16) == [[2, 2, 2]]


def test_sample_unseen() -> None:
    rng = np.random.default_rng(0)
    seen: set[tuple[int, ...]] = set()
    while (levels := sample_unseen(SMALL, rng, seen)) is not None:
        assert tuple(levels) not in seen
        seen.add(tuple(levels))
    assert len(seen) == 7


PLANS = PlanSpace.dense_calls([[1.0, 0.8, 0.6, 0.4]] * 32, 4)
START, OTHER = [4] * 28 + [0] * 4, [0, 4, 4, 4] * 4 + [4] * 16


def test_a_population_of_plans_is_starts_then_uniform_then_mixes_then_neighbours_then_random() -> None:
    space = PlanSpace.dense_calls([[1.0, 0.8, 0.6, 0.4]] * 32, 4, starts=[START, OTHER])
    population = hybrid(space, np.random.default_rng(0), 16)
    assert len(set(map(tuple, population))) == 16 and all(map(space.is_feasible, population))
    assert population[:3] == [START, OTHER, space.uniform()]
    assert [len(space.called(plan)) for plan in population[3:6]] == [5, 6, 10]
    differ = [min(int(np.not_equal(plan, start).sum()) for start in (START, OTHER)) for plan in population[6:]]
    assert np.mean(differ[:6]) < 5 < np.mean(differ[6:])
    assert hybrid(space, np.random.default_rng(0), 16) == population
    assert hybrid(space, np.random.default_rng(1), 16)[:6] == population[:6]
    assert hybrid(space, np.random.default_rng(1), 16)[6:] != population[6:]
    assert hybrid(space, np.random.default_rng(0), 2) == [START, OTHER]


def test_a_population_of_plans_without_starts_is_random_after_the_mixes() -> None:
    population = hybrid(PLANS, np.random.default_rng(0), 12)
    assert len(population) == 12 and population[0] == PLANS.uniform()
    dense = PlanSpace.dense_calls([[1.0, 0.5]] * 6, 5, allowed=(0,))
    assert hybrid(dense, np.random.default_rng(0), 3)[0].count(0) == 5
