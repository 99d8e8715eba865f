from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Counting, small_config

from diffes.adapters.macs import macs_per_call
from diffes.errors import DiffesError
from diffes.search.plan import PlanSpace
from diffes.study.plans import Plans
from diffes.study.workbench import Workbench, prepare


@pytest.fixture(scope="module")
def plans(tiny_folder: Path) -> Plans:
    config = small_config(tiny_folder, method="obs", cost="macs", budget=1.0, probes=2, heldout=2, max_evals=24)
    return Plans(prepare(config, Counting()), nodes=12)


def test_costs_are_those_of_the_stage_that_a_node_lies_in(plans: Plans) -> None:
    table = plans.bench.costs
    assert len(plans.costs) == 12
    assert plans.costs[0] == table[0] and plans.costs[-1] == table[-1] and plans.costs[3] == table[1]
    space = plans.space(3.0)
    assert isinstance(space, PlanSpace) and space.skip == plans.bench.space.max_level + 1
    assert plans.cost(space.schedule(space.uniform())) == 3.0
    assert plans.space(3.0, "steps").allowed == (0,)


def test_joint_search_from_the_table_is_never_behind_dense_steps(plans: Plans) -> None:
    """Its starts hold the best of dense steps; both meet the budget, and are better than evenly spaced calls."""
    table = plans.table(Counting())
    steps = plans.search(3.0, "steps", starts=plans.starts(table, 3.0, "steps"), progress=Counting())
    starts = plans.starts(table, 3.0, known=[steps.best.schedule.levels, [0] * plans.nodes])
    assert starts[0] == steps.best.schedule.levels  # the second costs too much
    joint = plans.search(3.0, starts=starts, table=table, progress=Counting())
    for result in (steps, joint):
        assert len(result.evaluations) == 24
        assert plans.cost(result.best.schedule) <= 3.0 + 1e-6
    even = plans.space(3.0).uniform()
    first = plans.searched.scores(plans.space(3.0).schedule(even)).mean()
    assert joint.best.fitness >= steps.best.fitness >= float(first)
    assert {level for level in steps.best.schedule.levels if level <= plans.bench.space.max_level} == {0}


def test_one_table_starts_every_budget(plans: Plans) -> None:
    table = plans.table(Counting())
    for calls in (1.5, 4.0):
        found = plans.starts(table, calls)
        assert found and all(plans.space(calls).is_feasible(levels) for levels in found)


def test_starts_of_a_sum_do_without_one_part_in_turn(tiny_folder: Path) -> None:
    """Forecasts are not as good for thin and reusing calls together, so the best of each alone comes early."""
    config = small_config(tiny_folder, method="magnitude+block_reuse", cost="macs", metric="latent_mse")
    plans = Plans(prepare(config, Counting()), nodes=12)
    space = plans.space(3.0)
    found = plans.starts(plans.table(Counting()), 3.0)[:9]
    levels = [{level for level in plan if level < space.skip} for plan in found]
    assert any(each <= set(space.first_levels) and each != {0} for each in levels)
    assert any(each <= {0, *space.reusing} and each != {0} for each in levels)


def test_the_same_seed_finds_the_same_plan(plans: Plans) -> None:
    one, other = (plans.search(2.5, strategy="evolution", max_evals=20, progress=Counting()) for _ in range(2))
    assert [e.schedule for e in one.evaluations] == [e.schedule for e in other.evaluations]


def test_what_cannot_be_planned_is_refused(plans: Plans, bench: Workbench) -> None:
    with pytest.raises(DiffesError, match="set cost to macs or latency"):
        Plans(bench)
    with pytest.raises(DiffesError, match="unknown solver of plans 'heun'"):
        Plans(plans.bench, solver="heun")
    with pytest.raises(DiffesError, match=r"calls must be at least 0\.\d+ dense calls"):
        plans.space(0.001)
    with pytest.raises(DiffesError, match="nodes must be at least 2, got 1"):
        Plans(plans.bench, nodes=1)
    few = replace(plans.bench, space=replace(plans.bench.space, steps=(1, 0, 1, 1)))
    with pytest.raises(DiffesError, match=r"stages \[1\] are not calibrated"):
        Plans(few)
    with pytest.raises(DiffesError, match="exhaustive"):
        plans.search(3.0, strategy="exhaustive", progress=Counting())


def test_the_cost_of_a_plan_is_the_macs_of_its_run(plans: Plans) -> None:
    """Counted call by call on the routed model, in units of a dense call; no plan exceeds its budget."""
    adapter, router = plans.bench.adapter, plans.bench.router
    dense = macs_per_call(adapter)
    space, rng = plans.space(4.0), np.random.default_rng(0)
    for _ in range(5):
        genome = space.schedule(space.sample(rng))
        plan = plans.searched.plan(genome)
        with router.routed(plan):
            counted = sum(macs_per_call(adapter, timestep) for timestep in plan.timesteps)
        assert counted / dense == pytest.approx(plans.cost(genome), rel=1e-9)
        assert plans.cost(genome) <= 4.0 + 1e-9
