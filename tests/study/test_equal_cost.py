"""Budgets above: whatever the costs of levels, all that is found there costs at least the budget below."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diffes.config import RunConfig
from diffes.spaces.schedule import Stages
from diffes.spaces.space import SearchSpace
from diffes.study.equal_cost import TOLERANCE, config_of, denser, same

LEVELS = RunConfig(genes="levels").resolved()


def space_of(cost: str, costs: np.ndarray, steps: list[int], budget: float) -> SearchSpace:
    stages = Stages.equal(len(steps))
    if cost == "level":
        return SearchSpace.mean_sparsity(stages, costs.shape[1] - 1, budget, steps)
    return SearchSpace.dense_fraction(stages, steps, costs.tolist(), budget)


@pytest.mark.parametrize("cost", ["macs", "level"])
@pytest.mark.parametrize("seed", range(8))
def test_all_that_is_feasible_above_costs_at_least_the_budget(cost: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = np.sort(rng.uniform(0.2, 1, (3, 5)), axis=1)[:, ::-1]
    steps = [int(n) for n in rng.integers(1, 4, 3)]
    budget = float(rng.uniform(0.55, 0.95))
    above = denser(replace(LEVELS, cost=cost, budget=budget), space_of(cost, costs, steps, budget))
    space = space_of(cost, costs, steps, above.budget or 0.0)
    dense = space.cost([0, 0, 0])
    target = budget if cost == "macs" else 1 - budget
    assert all(space.cost(space.sample(rng)) / dense >= target - 1e-5 for _ in range(200))


def test_the_budget_above_stops_at_the_dense_model() -> None:
    costs = np.array([[1.0, 0.1]])
    macs, level = (replace(LEVELS, cost=cost, budget=b) for cost, b in (("macs", 0.9), ("level", 0.1)))
    assert denser(macs, space_of("macs", costs, [2], 0.9)).budget == 1
    assert denser(level, space_of("level", costs, [2], 0.1)).budget == 0


def test_costs_are_the_same_within_half_a_percent() -> None:
    assert same([0.55, 0.55 * (1 + TOLERANCE)]) and not same([0.545, 0.55]) and TOLERANCE == 0.005


def test_stored_settings_of_before_are_understood() -> None:
    old = {name: value for name, value in replace(LEVELS, stages=7).to_json().items() if name != "allocation"}
    assert config_of(old | {"gone": 1}) == replace(LEVELS, stages=7, allocation="equal")
