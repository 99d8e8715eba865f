"""SearchSpace: every way to make a genome meets the budget exactly, whatever the steps and the costs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from diffes.errors import DiffesError
from diffes.spaces.schedule import Stages
from diffes.spaces.space import SearchSpace, first_computes

BUDGETS = [0, 0.3, 0.33, 0.5, 1]
STEPS = {
    "equal": None,
    "unequal": (1, 4, 2, 3, 2, 7),
    "unvisited": (0, 4, 0, 3, 5, 0),
    "one_visited": (0, 0, 5, 0, 0, 0),
}


@pytest.fixture(params=itertools.product(STEPS, BUDGETS), ids=lambda param: f"{param[0]}-{param[1]}")
def space(request: pytest.FixtureRequest) -> SearchSpace:
    name, budget = request.param
    return SearchSpace.mean_sparsity(Stages.equal(6), 8, budget, STEPS[name])


def meets_budget(space: SearchSpace, levels: list[int]) -> bool:
    """Feasibility from its definition, without the library's bookkeeping."""
    assert space.budget is not None
    cost = sum(n * row[level] for n, row, level in zip(space.steps, space.level_costs, levels, strict=True))
    if cost > space.budget:
        return False
    for s, level in enumerate(levels):
        if level > 0:
            thicker = [*levels[:s], level - 1, *levels[s + 1 :]]
            if (
                sum(n * row[k] for n, row, k in zip(space.steps, space.level_costs, thicker, strict=True))
                <= space.budget
            ):
                return False
    return True


def test_samples_meet_the_budget(space: SearchSpace) -> None:
    rng = np.random.default_rng(1)
    for _ in range(30):
        levels = space.sample(rng)
        assert all(type(level) is int and 0 <= level <= 8 for level in levels)
        assert meets_budget(space, levels)
        assert space.is_feasible(levels)


def test_uniform_meets_the_budget_and_is_flat(space: SearchSpace) -> None:
    levels = space.uniform()
    assert meets_budget(space, levels)
    visited = [levels[s] for s in space.visited]
    assert max(visited) - min(visited) <= 1 or space.steps == STEPS["unequal"] or space.steps == STEPS["unvisited"]
    assert max(visited) - min(visited) <= 3


def test_stages_without_a_step_stay_dense(space: SearchSpace) -> None:
    rng = np.random.default_rng(2)
    unvisited = [s for s in range(6) if space.steps[s] == 0]
    for levels in [space.uniform(), space.sample(rng), space.repair([8] * 6, rng), space.repair([0] * 6, rng)]:
        assert all(levels[s] == 0 for s in unvisited)
    for s in unvisited:
        levels = space.uniform()
        levels[s] = 1
        assert not space.is_feasible(levels)


def test_repair_leaves_feasible_genomes_alone(space: SearchSpace) -> None:
    rng = np.random.default_rng(3)
    for _ in range(10):
        levels = space.sample(rng)
        assert space.repair(levels, rng) == levels


def test_repair_takes_any_integers(space: SearchSpace) -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        assert meets_budget(space, space.repair(rng.integers(-5, 20, 6).tolist(), rng))


def test_is_feasible_agrees_with_its_definition() -> None:
    space = SearchSpace(Stages.equal(3), 3, (1, 2, 4), ((10, 7, 3, 1), (9, 8, 3, 0), (10, 7, 6, 1)), 40)
    feasible = 0
    for levels in itertools.product(range(4), repeat=3):
        assert space.is_feasible(levels) == meets_budget(space, list(levels))
        feasible += space.is_feasible(levels)
    assert 0 < feasible < 64


def test_equal_steps_give_the_papers_equality() -> None:
    space = SearchSpace.mean_sparsity(Stages.equal(4), 8, 0.5)
    for levels in itertools.product(range(0, 9, 2), repeat=4):
        assert space.is_feasible(levels) == (sum(levels) == 16)


def test_budget_ends() -> None:
    stages = Stages.equal(4)
    assert SearchSpace.mean_sparsity(stages, 8, 0).uniform() == [0] * 4
    assert SearchSpace.mean_sparsity(stages, 8, 1).uniform() == [8] * 4


def test_budget_is_rounded_up_and_floats_do_not_leak() -> None:
    stages = Stages.equal(10)
    assert sum(SearchSpace.mean_sparsity(stages, 8, 0.33).uniform()) == 27
    assert sum(SearchSpace.mean_sparsity(stages, 10, 0.3).uniform()) == 30
    assert sum(SearchSpace.mean_sparsity(stages, 10, 0.1 + 0.2).uniform()) == 30


def test_same_generator_same_sample(space: SearchSpace) -> None:
    assert space.sample(np.random.default_rng(7)) == space.sample(np.random.default_rng(7))


def test_random_state_of_numpy_is_left_alone(space: SearchSpace) -> None:
    before = str(np.random.get_state())  # its words and how many of them were used
    space.sample(np.random.default_rng(0))
    space.uniform()
    assert str(np.random.get_state()) == before


@pytest.mark.parametrize("budget", [-0.1, 1.1, float("nan"), "0.5"])
def test_a_budget_beyond_the_ends_is_refused_with_both_ends(budget: float) -> None:
    with pytest.raises(DiffesError, match=r"in \[0, 1\], got .*With 0 the model stays dense; 1 removes everything"):
        SearchSpace.mean_sparsity(Stages.equal(4), 8, budget)


def test_an_unreachable_cost_names_smallest_and_largest() -> None:
    with pytest.raises(DiffesError, match=r"Costs go from 8 .* to 80 "):
        SearchSpace(Stages.equal(4), 1, (2, 2, 2, 2), ((10, 1),) * 4, 7)


@pytest.mark.parametrize("steps", [(1, 1), (0, 0, 0, 0), (1, 1, 1, -1)])
def test_wrong_steps_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(DiffesError, match="steps must have 4 numbers of calls"):
        SearchSpace.mean_sparsity(Stages.equal(4), 8, 0.5, steps)


@pytest.mark.parametrize("costs", [((3, 2),) * 2, ((3, 2, 1),), ((3, 2, 1), (1, 2, 3))])
def test_level_costs_must_not_rise(costs: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(DiffesError, match="never rise"):
        SearchSpace(Stages.equal(2), 2, (1, 1), costs, 6)


MEASURED: list[list[float]] = [[10, 9.1, 6.2, 5, 1.3], [10, 8, 8.5, 3, 2], [9, 8, 7, 6, 5], [9, 5, 4, 3, 3]]


@pytest.mark.parametrize("budget", [0.35, 0.5, 0.77, 1])
def test_a_budget_in_measured_costs(budget: float) -> None:
    """Feasible genomes cost at most that fraction; one level less anywhere, and they would cost more."""
    steps = (3, 1, 2, 2)
    space = SearchSpace.dense_fraction(Stages.equal(4), steps, MEASURED, budget)
    dense = sum(n * row[0] for n, row in zip(steps, MEASURED, strict=True))
    rng = np.random.default_rng(0)
    for levels in [space.uniform(), *(space.sample(rng) for _ in range(50))]:
        assert meets_budget(space, levels)
        spent = sum(n * min(row[: k + 1]) for n, row, k in zip(steps, MEASURED, levels, strict=True))
        assert budget - 0.4 <= spent / dense <= budget + 1e-5
        assert levels[1] != 2 and levels[3] != 4  # as costly as the next denser level


def test_a_measured_budget_below_the_cheapest_schedule_is_refused() -> None:
    for budget in (0.2, 1.01, math.nan):
        with pytest.raises(DiffesError, match=r"in \[0\.\d+, 1\], got"):
            SearchSpace.dense_fraction(Stages.equal(4), (3, 1, 2, 2), MEASURED, budget)


def test_without_a_budget_everything_is_feasible_but_thin_stages_that_no_step_visits() -> None:
    space = SearchSpace.mean_sparsity(Stages.equal(3), 4, 0.5, (2, 0, 1)).without_budget()
    assert space.is_feasible([4, 0, 1]) and not space.is_feasible([4, 1, 1]) and not space.is_feasible([5, 0, 1])
    assert space.repair([9, 3, -2], np.random.default_rng(0)) == [4, 0, 0]
    assert space.uniform() == [0, 0, 0]


def test_what_counts_as_a_result() -> None:
    space = SearchSpace.mean_sparsity(Stages.equal(3), 4, 0.5)
    assert space.counts(space.any_schedule([2, 2, 2]), 1) and space.counts(space.any_schedule([4, 4, 4]), 1)
    assert not space.counts(space.any_schedule([2, 2, 1]), 1) and not space.counts(space.any_schedule([2, 2, 2]), 0.5)


def test_schedule_refuses_what_is_off_the_budget() -> None:
    space = SearchSpace.mean_sparsity(Stages.equal(4), 8, 0.5)
    assert space.schedule(np.array([4, 4, 4, 4])).levels == (4, 4, 4, 4)  # type: ignore[arg-type]
    for levels in ([4, 4, 4, 3], [4, 4, 4, 5]):
        with pytest.raises(DiffesError, match="do not meet the budget of 16"):
            space.schedule(levels)


def test_the_whole_dense_cost_allows_the_dense_model() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        costs = np.sort(rng.random((3, 5)) * rng.choice([1e-3, 1.0, 1e6]), axis=1)[:, ::-1]
        space = SearchSpace.dense_fraction(Stages.equal(3), rng.integers(1, 9, 3).tolist(), costs.tolist(), 1)
        assert space.fits([0, 0, 0])


def test_the_first_call_of_a_run_is_counted_dense() -> None:
    costs = [[10.0, 8.0, 3.0], [12.0, 8.0, 4.0], [9.0, 9.0, 9.0]]
    found = first_computes(costs, [3, 2, 0], (2,))
    assert found == [[10, 8, 3], [12, 8, 4 + (12 - 4) / 2], [9, 9, 9]] and costs[1][2] == 4
    assert first_computes(costs, [3, 2, 0], ()) == costs


def test_no_schedule_costs_more_than_measured_where_costs_cross() -> None:
    costs = [[10.0, 5.0, 6.0, 7.0, 2.0], [10.0, 11.0, 12.0, 3.0, 3.5]]
    space = SearchSpace.dense_fraction(Stages.equal(2), [1, 1], costs, 0.6)
    rng = np.random.default_rng(0)
    for _ in range(50):
        levels = space.sample(rng)
        assert sum(row[level] for row, level in zip(costs, levels, strict=True)) <= 0.6 * 20 + 1e-4
