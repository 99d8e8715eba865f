"""PlanSpace: what a plan costs, which are feasible, and every way to make one."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from diffes.errors import DiffesError
from diffes.spaces.initial import hybrid
from diffes.spaces.plan import PlanSpace, calls_of, plans_only, schedules_only
from diffes.spaces.schedule import Stages
from diffes.testing import PLANS, SPACES

FOUR = [[1.0, 0.5]] * 4
MS = [[2.0, 2.1, 1.4], [2.0, 1.9, 1.5], [1.6, 1.7, 1.7], [2.4, 1.0, 1.9]]  # levels cross, nodes differ


def random_space(rng: np.random.Generator) -> tuple[PlanSpace, np.ndarray, float]:
    """A space of random costs, with those costs and its budget in dense calls."""
    n, h = int(rng.integers(1, 13)), int(rng.integers(0, 5))
    costs = rng.uniform(0.2, 1.2, (n, h + 1)) * rng.choice([1e-3, 1.0, 1e9])
    allowed = sorted(rng.choice(h + 1, int(rng.integers(1, h + 2)), replace=False).tolist())
    smallest = costs[:, allowed].min() / costs[:, 0].mean()
    calls = float(smallest + 1e-5 + rng.random() * n)
    return PlanSpace.dense_calls(costs.tolist(), calls, allowed=allowed), costs, calls


def spent(costs: np.ndarray, levels: list[int]) -> float:
    """Of a plan in dense calls, from its definition."""
    return float(sum(costs[s, k] for s, k in enumerate(levels) if k < costs.shape[1]) / costs[:, 0].mean())


def test_whatever_makes_a_plan_keeps_the_true_budget() -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        space, costs, calls = random_space(rng)
        junk = rng.integers(-3, space.max_level + 4, space.n_stages).tolist()
        plans = [space.uniform(), space.sample(rng), space.repair(junk, rng), space.repair([0] * space.n_stages, rng)]
        for plan in plans:
            assert space.is_feasible(plan) and all(type(level) is int for level in plan)
            assert spent(costs, plan) <= calls * (1 + 1e-9)
            assert set(plan) <= {*space.allowed, space.skip} and set(plan) != {space.skip}


@pytest.mark.parametrize("cost", [1.0, 0.1, 3.7e9, 1 / 3])
def test_whole_dense_calls_fit_to_the_last(cost: float) -> None:
    for calls in range(1, 65):
        space = PlanSpace.dense_calls([[cost, cost * 1.03, cost * 0.6]] * 64, calls)
        plan = space.uniform()
        assert plan.count(0) == calls and plan.count(space.skip) == 64 - calls
        assert plan[63] == 0


def test_is_feasible_agrees_with_its_definition() -> None:
    space = PlanSpace.dense_calls(MS, 1.8, allowed=(0, 2))
    feasible = 0
    for plan in itertools.product(range(-1, 5), repeat=4):
        inside = all(level in (0, 2, 3) for level in plan) and any(level < 3 for level in plan)
        expected = inside and spent(np.array(MS), list(plan)) <= 1.8
        assert space.is_feasible(plan) == space.fits(plan) == expected
        feasible += expected
    assert 0 < feasible < 3**4


def test_a_plan_may_leave_budget_unspent() -> None:
    space = PlanSpace.dense_calls(FOUR, 3)
    assert space.is_feasible([2, 2, 2, 1]) and not space.is_feasible([2, 2, 2, 2]) and not space.is_feasible([0] * 4)
    assert not space.is_feasible([2, 2, 1])


def test_repair_leaves_feasible_plans_alone_and_fills_no_skipped_node() -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        space, _, _ = random_space(rng)
        plan = space.sample(rng)
        assert space.repair(plan, rng) == plan
        dear = [0 if rng.random() < 0.5 else space.skip for _ in range(space.n_stages)]
        if dear.count(space.skip) < space.n_stages:
            repaired = space.repair(dear, rng)
            assert len(space.called(repaired)) == 1 or set(space.called(repaired)) <= set(space.called(dear))


def test_repair_rounds_to_allowed_levels_the_thinner_of_two() -> None:
    space = PlanSpace.dense_calls([[1.0] * 6] * 6, 9, allowed=(1, 3, 4))
    assert space.repair([-2, 0, 2, 3, 5, 6], np.random.default_rng(0)) == [1, 1, 3, 3, 4, 6]
    assert space.repair([9, 9, 1, 9, 9, 9], np.random.default_rng(0)) == [6, 6, 1, 6, 6, 6]


def test_repair_pays_by_dropping_and_by_thinning() -> None:
    space = PlanSpace.dense_calls([[1.0, 0.5]] * 8, 4)
    counts = {len(space.called(space.repair([0] * 8, np.random.default_rng(seed)))) for seed in range(40)}
    assert counts >= {4, 5, 6}


def test_a_plan_without_a_call_is_given_one_that_can_be_paid() -> None:
    space = PlanSpace.dense_calls(MS, 0.6)  # only node 3 at level 1 costs as little
    assert space.repair([3] * 4, np.random.default_rng(0)) == [3, 3, 3, 1]
    assert space.repair([0] * 4, np.random.default_rng(0)) == [3, 3, 3, 1]
    assert space.uniform() == [3, 3, 3, 1] == space.sample(np.random.default_rng(0))


def test_uniform_is_trailing() -> None:
    space = PlanSpace.dense_calls([[1.0, 0.5]] * 10, 4.4)
    assert calls_of(space.schedule(space.uniform())) == ((999, 0), (799, 0), (499, 0), (199, 0))
    assert PlanSpace.dense_calls([[1.0, 0.5]] * 10, 40).uniform() == [0] * 10
    assert PlanSpace.dense_calls([[1.0, 0.5]] * 10, 0.7).uniform() == [2] * 9 + [1]
    assert PlanSpace.dense_calls([[1.0, 0.5]] * 10, 2, allowed=(1,)).uniform().count(1) == 4


def test_samples_are_spread_and_of_all_mixes() -> None:
    space = PlanSpace.dense_calls([[1 - 0.1 * k for k in range(9)]] * 64, 6)
    rng = np.random.default_rng(0)
    plans = [space.sample(rng) for _ in range(200)]
    counts = [len(space.called(plan)) for plan in plans]
    assert min(counts) <= 7 and max(counts) >= 15
    for plan in plans:
        gaps = np.diff([-1, *space.called(plan), 64])
        assert gaps.max() <= 4 * 64 / len(gaps) + 1
        assert 5 < spent(np.array([[1 - 0.1 * k for k in range(9)]] * 64), plan) <= 6 + 1e-9


def test_spend_makes_calls_denser_and_adds_none() -> None:
    space = PlanSpace.dense_calls([[1.0, 0.8, 0.5]] * 6, 2.1)
    plan = space.spend([3, 2, 3, 2, 3, 2], np.random.default_rng(0))
    assert space.called(plan) == [1, 3, 5] and space.is_feasible(plan)
    assert space.cost(plan) + 200_000 > (space.budget or 0)
    dense = PlanSpace.dense_calls([[1.0, 1.2]] * 3, 1.2)  # a denser level that is cheaper too
    assert dense.spend([2, 1, 2], np.random.default_rng(0)) == [2, 0, 2]
    assert PLANS["no budget"].spend([4] * 16, np.random.default_rng(0)) == [4] * 16


def test_pay_spares_whom_it_should() -> None:
    space = PlanSpace.dense_calls([[1.0, 0.5]] * 6, 1.5)
    for seed in range(20):
        plan = space.pay([0] * 6, np.random.default_rng(seed), spare=(2,))
        assert plan[2] == 0 and space.affords(plan)


def test_cheaper_goes_by_cost_and_denser_by_level() -> None:
    space = PlanSpace.dense_calls(MS, 4)
    assert space.cheaper(0, 1) == [0, 2] and space.cheaper(0, 2) == [] and space.cheaper(3, 0) == [2, 1]
    assert space.denser(2) == [1, 0] and space.denser(0) == []
    assert PlanSpace.dense_calls(MS, 4, allowed=(0, 2)).cheaper(0, 1) == [0, 2]


def test_without_a_budget_every_plan_with_a_call_is_feasible() -> None:
    space = PlanSpace.dense_calls(MS, 1.0, allowed=(0, 2)).without_budget()
    assert isinstance(space, PlanSpace) and space.is_feasible([0] * 4) and not space.is_feasible([3] * 4)
    assert space.uniform() == [0] * 4
    rng = np.random.default_rng(0)
    assert {len(space.called(space.sample(rng))) for _ in range(60)} == {1, 2, 3, 4}


def test_constants_are_of_every_cost() -> None:
    plans = PlanSpace.dense_calls([[1.0, 0.5]] * 64, 4).constants()
    counts = [plan.count(0) for plan in plans]
    assert counts[0] == 1 and counts[-1] == 64 and counts == sorted(set(counts)) and len(counts) > 6


def test_the_calls_of_a_plan_are_at_the_noisiest_timestep_of_their_nodes() -> None:
    space = PlanSpace.dense_calls([[1.0, 0.5]] * 4, 3, n_timesteps=100)
    assert calls_of(space.schedule([1, 2, 0, 2])) == ((74, 0), (24, 1))
    assert space.genes == (0, 1, 2) and space.skip == 2 and space.visited == [0, 1, 2, 3]


def test_the_generator_decides_everything() -> None:
    space = PLANS["crossing costs"]
    for make in (space.sample, lambda rng: space.repair([0] * 8, rng), lambda rng: hybrid(space, rng, 16)):
        assert make(np.random.default_rng(7)) == make(np.random.default_rng(7))


@pytest.mark.parametrize("calls", [0.1, 0, -1, math.nan, math.inf])
def test_a_budget_below_the_cheapest_plan_is_refused(calls: float) -> None:
    with pytest.raises(DiffesError, match=rf"a finite number of at least 0\.5000 dense calls.*got {calls}"):
        PlanSpace.dense_calls(FOUR, calls)
    with pytest.raises(DiffesError, match=r"at least 1\.0000"):
        PlanSpace.dense_calls(FOUR, 0.6, allowed=(0,))


def whole(**changes: Any) -> PlanSpace:
    settings: dict[str, Any] = {
        "stages": Stages.equal(2), "max_level": 2, "steps": (1, 1), "level_costs": ((10, 4, 0), (10, 5, 0)),
        "budget": 14, "allowed": (0, 1),
    }  # fmt: skip
    return PlanSpace(**{**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": (1, 2)}, "must be 2 ones"),
        ({"budget": 3}, "costs 3 or less. The cheapest, .* costs 4. Raise the budget"),
        ({"budget": 9, "allowed": (0,)}, "costs 10. Raise"),
        ({"allowed": ()}, r"one or more rising levels in \[0, 1\], got \(\)"),
        ({"allowed": (1, 0)}, "rising levels"),
        ({"allowed": (0, 2)}, "2 means a skipped node"),
        ({"level_costs": ((10, 4, 1), (10, 5, 0))}, "0 at the end for a skipped node"),
        ({"level_costs": ((10, 0, 0), (10, 5, 0))}, "costs above 0"),
        ({"level_costs": ((10, 0), (10, 5, 0))}, r"2 nodes with 3 whole numbers"),
        ({"starts": ((0, 0),)}, r"plan \[0, 0\] is not feasible. It costs 20, and the budget is 14"),
        ({"starts": ((2, 2),)}, "at least one call"),
    ],
)
def test_wrong_spaces_are_refused(changes: dict[str, Any], message: str) -> None:
    whole()
    with pytest.raises(DiffesError, match=message):
        whole(**changes)


@pytest.mark.parametrize("costs", [[[1.0, math.nan]], [[1.0, 0.0]], [[-1.0]], [1.0, 2.0]])
def test_costs_are_positive_numbers(costs: Any) -> None:
    with pytest.raises(DiffesError, match="positive numbers"):
        PlanSpace.dense_calls(costs, 1)


def test_who_wants_another_kind_of_space_says_so() -> None:
    assert plans_only(PLANS["plans"], "me") is PLANS["plans"]
    with pytest.raises(DiffesError, match=r"'me' works on plans only.*leave the operator out"):
        plans_only(SPACES["paper"], "me")
    schedules_only(SPACES["paper"], "me")
    with pytest.raises(DiffesError, match=r"'me' works on levels of stages.*plans of 16 nodes"):
        schedules_only(PLANS["plans"], "me")


def test_the_first_call_cannot_reuse() -> None:
    space = PlanSpace.dense_calls([[1.0, 0.8, 0.3]] * 6, 3, reusing=(2,))
    assert space.first_levels == [0, 1] and space.reusing == (2,)
    assert space.is_feasible([3, 2, 2, 1, 3, 3]) and not space.is_feasible([3, 1, 1, 2, 3, 3])
    assert space.grounded([3, 2, 2, 3, 3, 3]) == [3, 2, 0, 3, 3, 3] and space.grounded([3] * 6) == [3] * 6
    rng = np.random.default_rng(0)
    for _ in range(200):
        plan = space.repair(rng.integers(0, 4, 6).tolist(), rng)
        assert space.is_feasible(plan) and plan[space.called(plan)[-1]] != 2
    assert space.evenly_spaced(2) == [2, 2, 2, 2, 2, 0] and space.uniform() == [3, 0, 3, 0, 3, 0]
    with pytest.raises(DiffesError, match="the noisiest call in"):
        space.schedule([3, 2, 2, 3, 3, 3])


def test_a_space_needs_a_level_that_reuses_nothing() -> None:
    for reusing in ((0, 1), (0,)):
        with pytest.raises(DiffesError, match="The first call of a run has nothing to reuse"):
            PlanSpace.dense_calls([[1.0, 0.3]] * 4, 2, reusing=reusing)
    with pytest.raises(DiffesError, match=r"a finite number of at least 1\.0000 dense calls"):
        PlanSpace.dense_calls([[1.0, 0.3]] * 4, 0.5, reusing=(1,))
    dense = PlanSpace.dense_calls([[1.0, 0.3]] * 4, 2, allowed=(0,), reusing=(1,))
    assert dense.reusing == ()
