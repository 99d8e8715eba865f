"""Mutations of plans: what each changes, and that the budget is kept whatever levels cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from diffes.errors import DiffesError
from diffes.spaces.genome import Genome
from diffes.spaces.plan import PlanSpace
from diffes.testing import SPACES, MutationConformance
from search_strategies import mutations
from search_strategies.crossovers import node_exchange
from search_strategies.plan_mutations import (
    MOVES,
    add_call,
    drop_call,
    merge_calls,
    move_call,
    plan_move,
    split_call,
    trade_levels,
)


class TestMoveCall(MutationConformance):
    name = "move_call"
    plans_only = True


class TestTradeLevels(MutationConformance):
    name = "trade_levels:max_levels=1"
    plans_only = True


class TestAddCall(MutationConformance):
    name = "add_call"
    plans_only = True


class TestDropCall(MutationConformance):
    name = "drop_call"
    plans_only = True


class TestSplitCall(MutationConformance):
    name = "split_call:max_shift=6"
    plans_only = True


class TestMergeCalls(MutationConformance):
    name = "merge_calls"
    plans_only = True


class TestPlanMove(MutationConformance):
    name = "plan_move:max_moves=5"
    plans_only = True


LINEAR = [[1.0, 0.8, 0.6, 0.4]] * 20  # levels 0 to 3; 4 is a skipped node
SPACE = PlanSpace.dense_calls(LINEAR, 3)
DENSE = PlanSpace.dense_calls(LINEAR, 3, allowed=(0,))
FREE = SPACE.without_budget()
PLAN = [4, 4, 2, 4, 4, 4, 1, 4, 4, 4, 4, 4, 2, 4, 4, 3, 4, 4, 4, 3]  # 0.6 + 0.8 + 0.6 + 0.4 + 0.4 = 2.8 dense calls


def changed(mutate: Callable[..., Any], space: PlanSpace = SPACE, plan: list[int] = PLAN, **options: Any) -> Any:
    """What 200 seeds make of a plan."""
    for seed in range(200):
        (child,) = mutate(Genome(plan), space=space, rng=np.random.default_rng(seed), **options)
        assert space.is_feasible(child)
        yield child


def calls(plan: list[int]) -> dict[int, int]:
    return {node: level for node, level in enumerate(plan) if level < 4}


def test_operators_keep_random_spaces_feasible_and_are_decided_by_their_generator() -> None:
    """Costs cross and differ by node, any levels are allowed, the budget is any."""
    rng = np.random.default_rng(0)
    ordinary = [getattr(mutations, n) for n in ("level_switch", "level_step", "swap_stages", "shift_window")]
    for trial in range(60):
        n, h = int(rng.integers(1, 16)), int(rng.integers(0, 5))
        costs = rng.uniform(0.2, 1.2, (n, h + 1))
        allowed = (0,) if trial % 4 == 0 else sorted(rng.choice(h + 1, int(rng.integers(1, h + 2)), False).tolist())
        smallest = costs[:, list(allowed)].min() / costs[:, 0].mean()
        space = PlanSpace.dense_calls(costs.tolist(), smallest * 1.001 + float(rng.random()) * n / 2, allowed=allowed)
        for mutate in (*MOVES, plan_move, *ordinary, mutations.segment_transfer):
            first, second = space.sample(rng), space.sample(rng)
            for seed in range(4):
                once, again = (
                    mutate(Genome(first), space=space, rng=np.random.default_rng(seed))[0]  # type: ignore[operator]
                    for _ in range(2)
                )
                assert space.is_feasible(once) and once == again, (mutate, first, once)
            for child in node_exchange(Genome(first), Genome(second), space=space, rng=rng):
                assert space.is_feasible(child)


def test_move_call_moves_one_call_to_a_near_skipped_node() -> None:
    moves = set()
    for child in changed(move_call, max_shift=3):
        before, after = calls(PLAN), calls(child)
        (gone,), (come,) = before.keys() - after.keys(), after.keys() - before.keys()
        assert before[gone] == after[come]
        moves.add(come - gone)
    assert moves == {-3, -2, -1, 1, 2, 3}


def test_trade_levels_makes_one_call_cheaper_and_another_denser() -> None:
    found = set()
    for child in changed(trade_levels):
        change = [b - a for a, b in zip(PLAN, child, strict=True) if a != b]
        assert [s for s in range(20) if child[s] == 4] == [s for s in range(20) if PLAN[s] == 4]
        assert sum(c > 0 for c in change) == 1 and sum(c < 0 for c in change) <= 1
        found.add(tuple(sorted(change)))
    assert {(-1, 1), (-2, 1), (-2, 2)} <= found


def test_trade_levels_goes_by_cost_where_costs_cross() -> None:
    """Level 1 costs more than dense: who gives goes from 1 to 0 or 2, and never from 0 to 1."""
    space = PlanSpace.dense_calls([[1.0, 1.1, 0.5]] * 6, 3)
    givers = set()
    for child in changed(trade_levels, space, [1, 3, 3, 0, 2, 3], max_levels=1):
        givers.add((child[0], child[3]))
    assert givers == {(0, 0), (1, 2), (0, 2)}


def test_add_call_adds_one_and_others_pay() -> None:
    counts, levels = set(), set()
    for child in changed(add_call):
        (come,) = calls(child).keys() - calls(PLAN).keys()
        counts.add(len(calls(child)))
        levels.add(child[come])
        assert all(child[s] >= level for s, level in calls(PLAN).items())
    assert {5, 6} <= counts and levels == {0, 1, 2, 3}
    for child in changed(add_call, FREE):
        assert {s: k for s, k in calls(child).items() if PLAN[s] < 4} == calls(PLAN) and len(calls(child)) == 6


def test_drop_call_spends_what_it_frees() -> None:
    counts = set()
    for child in changed(drop_call):
        gone = calls(PLAN).keys() - calls(child).keys()
        counts.add(len(calls(child)))
        assert gone
        assert SPACE.cost(child) + 200_000 > (SPACE.budget or 0) or set(calls(child).values()) == {0}
    assert {4, 5} <= counts
    for child in changed(drop_call, FREE):
        assert calls(child).items() < calls(PLAN).items() and len(calls(child)) == 4
    assert all(child == [4] * 19 + [0] for child in changed(drop_call, plan=[4] * 19 + [0]))


def test_split_call_makes_two_cheaper_ones_near_it() -> None:
    found = set()
    for child in changed(split_call, max_shift=2):
        before, after = calls(PLAN), calls(child)
        new = {s: k for s, k in after.items() if before.get(s) != k}
        old = [s for s in before if after.get(s) != before[s]]
        assert len(after) == 6 and len(new) == 2 and len(old) == 1
        assert all(abs(s - old[0]) <= 2 and k > before[old[0]] for s, k in new.items())
        found.add((before[old[0]], *sorted(new.values())))
    assert found == {(1, 2, 3), (2, 3, 3)}  # with the 0.2 that are left: 1.0 for two, and 0.8


def test_what_cannot_be_split_stays() -> None:
    plan = [0 if level < 4 else 4 for level in PLAN]
    space = PlanSpace.dense_calls(LINEAR, 5, allowed=(0,))
    assert all(child == plan for child in changed(split_call, space, plan))


def test_merge_calls_makes_a_denser_one_between_two_neighbours() -> None:
    found = set()
    for child in changed(merge_calls):
        before, after = calls(PLAN), calls(child)
        gone = sorted(s for s in before if after.get(s) != before[s])
        (come,) = (s for s in after if before.get(s) != after[s])
        assert len(after) == 4 and after[come] < min(before[s] for s in before if s in gone)
        called = list(before)
        pairs = [(a, b) for a, b in itertools.pairwise(called) if a <= come <= b and {*gone} <= {a, b}]
        assert pairs
        found.add(after[come])
    assert found == {0, 1}
    single = [4] * 19 + [0]
    assert all(child == single for child in changed(merge_calls, plan=single))


def test_plan_move_makes_as_many_moves_as_are_drawn() -> None:
    once = list(changed(plan_move, max_moves=1))
    assert all(child != PLAN for child in once)
    counts = {len(calls(child)) for child in once}
    assert counts >= {4, 5, 6}
    differ = [np.mean([np.not_equal(c, PLAN).sum() for c in changed(plan_move, max_moves=m)]) for m in (1, 6)]
    assert differ[0] < differ[1]


def test_dense_plans_stay_dense_and_move() -> None:
    plan = [0 if s in (2, 9, 19) else 4 for s in range(20)]
    children = list(changed(plan_move, DENSE, plan))
    assert all(set(child) == {0, 4} for child in children)
    assert len(set(map(tuple, children))) > 60


@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        (move_call, "max_shift", 0),
        (split_call, "max_shift", 0),
        (trade_levels, "max_levels", 0),
        (plan_move, "max_moves", 0),
        (plan_move, "max_moves", 1.5),
    ],
)
def test_wrong_parameters_are_refused(function: Callable[..., Any], name: str, value: Any) -> None:
    with pytest.raises(DiffesError, match=rf"{name} must be .*got {value}"):
        function(Genome(PLAN), space=SPACE, rng=np.random.default_rng(0), **{name: value})


@pytest.mark.parametrize("function", [*MOVES, plan_move], ids=lambda function: function.__name__)
def test_a_space_of_stages_is_refused(function: Callable[..., Any]) -> None:
    space = SPACES["paper"]
    with pytest.raises(DiffesError, match=f"'{function.__name__}' works on plans only.*Choose an operator of levels"):
        function(Genome(space.uniform()), space=space, rng=np.random.default_rng(0))


def test_level_switch_works_on_the_calls_of_a_plan() -> None:
    for child in changed(mutations.level_switch, FREE):
        assert calls(child).keys() == calls(PLAN).keys() and sum(calls(child).values()) == sum(calls(PLAN).values())
    for child in changed(mutations.level_step, FREE):
        assert calls(child).keys() == calls(PLAN).keys()
    for child in changed(mutations.segment_transfer, FREE):
        assert calls(child).keys() == calls(PLAN).keys()
