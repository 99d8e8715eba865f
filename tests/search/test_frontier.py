"""The dynamic programme against all plans of tiny tables."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np
import pytest

from diffes.errors import DiffesError
from diffes.search.frontier import ErrorTable, Forecast, front, variants


def tiny(seed: int, n: int = 4, k: int = 2) -> ErrorTable:
    """Random errors, some jumps not allowed, costs from 1 to 4."""
    rng = np.random.default_rng(seed)
    errors = rng.uniform(0.1, 1, (n, n + 1, k)) * np.abs(np.subtract.outer(np.arange(n), np.arange(n + 1)))[:, :, None]
    errors[rng.random(errors.shape) < 0.1] = np.nan
    errors[0, n, 0] = 5.0
    start = np.where(rng.random(n) < 0.5, np.inf, rng.uniform(0, 2, n))
    start[0] = 0
    return ErrorTable(errors, start, rng.integers(1, 5, (n, k)).astype(float))


def by_hand(table: ErrorTable, levels: tuple[int, ...], power: float) -> tuple[float, float]:
    """Cost and error of a plan, from their definitions."""
    n, _, k = table.errors.shape
    sampled = levels[::-1]
    cost, error, before = 0.0, 0.0, None
    for i in range(n):
        if sampled[i] < k:
            parts = table.start[i] if before is None else table.errors[before, i, sampled[before]]
            error += parts**power
            cost += table.costs[i, sampled[i]]
            before = i
    assert before is not None
    error += table.errors[before, n, sampled[before]] ** power
    return cost, math.inf if math.isnan(error) else error ** (1 / power)


def brute(table: ErrorTable, max_cost: float, power: float, allowed: tuple[int, ...]) -> dict[float, float]:
    """The smallest error within every whole cost at which it falls."""
    n, _, k = table.errors.shape
    best: dict[float, float] = {}
    plans = itertools.product([*allowed, k], repeat=n)
    found = sorted(by_hand(table, plan, power) for plan in plans if min(plan) < k)
    lowest = math.inf
    for cost, error in found:
        if cost <= max_cost and error < lowest - 1e-12:
            best[cost] = lowest = error
    return best


@pytest.mark.parametrize("power", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("allowed", [(0, 1), (0,), (1,)])
def test_the_front_is_that_of_all_plans(power: float, allowed: tuple[int, ...]) -> None:
    for seed in range(25):
        table = tiny(seed)
        try:
            found = front(table, 10, resolution=10, power=power, allowed=allowed)
        except DiffesError:
            assert not brute(table, 10, power, allowed)
            continue
        expected = brute(table, 10, power, allowed)
        assert [each.cost for each in found] == list(expected)
        assert [each.error for each in found] == pytest.approx(list(expected.values()))
        for each in found:
            assert by_hand(table, each.levels, power) == pytest.approx((each.cost, each.error))


def large(seed: int = 0) -> ErrorTable:
    rng = np.random.default_rng(seed)
    n, k = 64, 9
    gaps = np.abs(np.subtract.outer(np.arange(n), np.arange(n + 1)))[:, :, None] / n
    thin = 1 + np.arange(k) ** 2 * rng.uniform(0.01, 0.2, n)[:, None]
    start = np.full(n, np.inf)
    start[0] = 0
    costs = np.tile(1 - 0.93 * np.arange(k) / 8, (n, 1))
    return ErrorTable(gaps**2 * thin[:, None] * rng.uniform(0.5, 2, n)[:, None, None], start, costs)


def test_a_front_falls_keeps_its_costs_and_is_quick() -> None:
    table = large()
    begun = time.process_time()
    found = front(table, 12)
    assert time.process_time() - begun < 2
    costs, errors = [each.cost for each in found], [each.error for each in found]
    assert len(found) > 50 and costs == sorted(costs) and errors == sorted(errors, reverse=True)
    assert costs[-1] <= 12 * (1 + 1e-9)
    for each in found[::20]:
        again = table.predict(each.levels)
        assert (again.cost, again.error) == pytest.approx((each.cost, each.error))
        assert each.levels[63] < 9 and len(each.levels) == 64


def test_rounded_costs_lose_little() -> None:
    table = large()
    coarse, fine = (front(table, 6, resolution=resolution)[-1] for resolution in (200, 3000))
    assert fine.error <= coarse.error < fine.error * 1.03 and max(coarse.cost, fine.cost) <= 6 * (1 + 1e-9)


def test_dense_calls_are_never_better_than_all_levels() -> None:
    table = large(1)
    joint, dense = front(table, 8), front(table, 8, allowed=(0,))
    assert [each.cost for each in dense] == pytest.approx(list(range(1, 9)))
    for each in dense:
        assert set(each.levels) == {0, 9}
        assert min(one.error for one in joint if one.cost <= each.cost + 1e-9) <= each.error


def test_the_first_call_may_be_below_the_noisiest_node() -> None:
    errors = np.full((3, 4, 1), 1.0)
    errors[0], errors[2] = 9.0, 3.0
    table = ErrorTable(errors, np.array([0, 0.5, 0.1]), np.ones((3, 1)))
    assert front(table, 1) == [Forecast((1, 0, 1), 1.0, 1.5)]


def test_variants_are_distinct_good_plans_within_the_budget() -> None:
    table = large(2)
    best = front(table, 5)[-1]
    found = variants(table, 5, 6)
    assert found[0].error == pytest.approx(best.error)
    assert len({each.levels for each in found}) == 6
    assert [each.error for each in found] == sorted(each.error for each in found)
    assert all(each.cost <= 5 * (1 + 1e-9) and each.error < 2 * best.error for each in found)
    assert all(set(each.levels) == {0, 9} for each in variants(table, 5, 3, allowed=(0,)))
    assert len(variants(tiny(0, n=1), 4, 9)) <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_cost": 0.5}, "no plan costs 0.5 or less: the smallest possible is 1; raise it"),
        ({"max_cost": math.nan}, "no plan costs nan"),
        ({"power": 0}, "power must be a positive number, got 0"),
        ({"resolution": 0}, "resolution must be at least 1, got 0"),
        ({"allowed": ()}, r"allowed must be levels in \[0, 1\]"),
        ({"allowed": (2,)}, r"allowed must be levels in \[0, 1\], at least one, got \(2,\)"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    table = ErrorTable(np.ones((2, 3, 2)), np.zeros(2), np.ones((2, 2)))
    with pytest.raises(DiffesError, match=message):
        front(table, **{"max_cost": 2, **options})


def test_a_table_without_a_way_to_the_end_is_refused() -> None:
    with pytest.raises(DiffesError, match="allows no plan of cost 2"):
        front(ErrorTable(np.full((2, 3, 1), np.nan), np.zeros(2), np.ones((2, 1))), 2)


def test_wrong_tables_are_refused() -> None:
    good = np.ones((2, 3, 1)), np.zeros(2), np.ones((2, 1))
    for i, bad, message in (
        (0, np.ones((2, 2, 1)), r"\(N, N \+ 1, K\)"),
        (0, np.ones(2), r"\(N, N \+ 1, K\)"),
        (1, np.zeros(3), r"\(N,\) starts"),
        (2, np.zeros((2, 1)), "positive"),
        (0, -np.ones((2, 3, 1)), "negative"),
    ):
        with pytest.raises(DiffesError, match=message):
            ErrorTable(*[bad if i == j else each for j, each in enumerate(good)])
    for levels in ([1, 1], [0]):
        with pytest.raises(DiffesError, match="2 nodes and at least one call"):
            ErrorTable(*good).predict(levels)
