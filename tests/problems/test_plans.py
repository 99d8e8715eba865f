from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Counting, plan_config

from diffes.adapters.macs import macs_per_call
from diffes.errors import DiffesError
from diffes.measure.currencies import clock_of
from diffes.problems.plans import Plans
from diffes.problems.workbench import Workbench, prepare
from diffes.spaces.plan import PlanSpace


@pytest.fixture(scope="module")
def plans(tiny_folder: Path) -> Plans:
    config = plan_config(tiny_folder, method="obs", probes=2, heldout=2, max_evals=24, nodes=12, fit_probes=4)
    return Plans(prepare(config, Counting()))


def test_costs_are_those_of_the_stage_that_a_node_lies_in(plans: Plans) -> None:
    table = plans.bench.costs
    assert len(plans.costs) == 12
    assert plans.costs[0] == table[0] and plans.costs[-1] == table[-1] and plans.costs[3] == table[1]
    space = plans.space(3.0)
    assert isinstance(space, PlanSpace) and space.skip == plans.bench.levels.max_level + 1
    assert plans.cost(plans.searched.plan(space.schedule(space.uniform()))) == 3.0
    assert plans.space(3.0, "steps").allowed == (0,)


def test_a_search_begins_with_even_spacings_and_what_is_known(plans: Plans) -> None:
    """Known plans first where they are feasible; of both kinds none is over the budget, and all are distinct."""
    steps = plans.search(3.0, "steps", progress=Counting())
    starts = plans.starts(3.0, known=[steps.best.schedule.levels, [0] * plans.nodes])
    assert starts[0] == steps.best.schedule.levels  # the second costs too much
    assert len(set(starts)) == len(starts) and all(plans.space(3.0).is_feasible(each) for each in starts)
    dense = plans.starts(3.0, "steps")
    assert {level for each in dense for level in each} == {0, plans.space(3.0).skip}
    assert [e.schedule.levels for e in steps.evaluations[:16]] == dense[:16]  # a first population
    joint = plans.search(3.0, starts=starts, progress=Counting())
    for result in (steps, joint):
        assert len(result.evaluations) == 24
        assert plans.cost(plans.searched.plan(result.best.schedule)) <= 3.0 + 1e-6
    assert joint.best.fitness >= steps.best.fitness >= max(e.fitness for e in steps.evaluations[:16])


def test_levels_of_starts_fall_on_the_way(plans: Plans) -> None:
    space = plans.space(3.0)
    for level in space.allowed[1:]:
        ramp = space.ramp(level)
        assert ramp is not None and space.is_feasible(ramp)
        levels = [ramp[node] for node in space.called(ramp)]  # the cleanest first
        assert levels == sorted(levels) and levels[0] == 0 and levels[-1] == level and len(levels) > 2


def test_every_evaluation_carries_the_coefficients_that_were_fitted_for_it(plans: Plans) -> None:
    found = plans.search(3.0, "steps", progress=Counting(), max_evals=6)
    for evaluation in found.evaluations:
        plan = plans.searched.plan(evaluation.schedule)
        assert evaluation.coefficients is not None and len(evaluation.coefficients) == len(plan.calls)
        again = plans.searched.measured(replace(plan, coefficients=evaluation.coefficients))[0]
        assert again == pytest.approx(evaluation.fitness, rel=1e-5)
    unfitted = plans.search(3.0, "steps", solver="dpmsolver++", progress=Counting(), max_evals=6)
    assert all(evaluation.coefficients is None for evaluation in unfitted.evaluations)
    assert unfitted.best.fitness < found.best.fitness


def test_finalists_are_fitted_on_probes_that_no_search_saw(plans: Plans) -> None:
    found = plans.search(3.0, "steps", progress=Counting())
    finals = [plans.finalist(plan) for plan in plans.finalists(found, plans.searched)]
    assert len(finals) == 4 and plans.searched.plan(found.best.schedule) == replace(finals[0].plan, coefficients=None)
    probes = set(plans.refitted.probes.seeds)
    assert not probes & set(plans.searched.probes.seeds)
    assert not probes & set(plans.heldout.probes.seeds)
    best = max(finals, key=lambda final: final.fitness)
    better = plans.polished(best)
    assert better.fitness > best.fitness and better.plan.timesteps == best.plan.timesteps
    assert float(plans.refitted.scores(better.plan).mean()) == pytest.approx(better.fitness)
    plain = plans.even(3.0, ["dpmsolver++"])
    assert plans.polished(plain) == plain and plain.fitness < best.fitness


def test_the_same_seed_finds_the_same_plan(plans: Plans) -> None:
    one, other = (plans.search(2.5, strategy="evolution", max_evals=20, progress=Counting()) for _ in range(2))
    assert [e.schedule for e in one.evaluations] == [e.schedule for e in other.evaluations]


def test_what_cannot_be_planned_is_refused(plans: Plans, bench: Workbench) -> None:
    with pytest.raises(DiffesError, match="set cost to macs or latency"):
        Plans(bench)
    with pytest.raises(DiffesError, match="unknown solver of plans 'heun'"):
        Plans(plans.bench, solver="heun")
    with pytest.raises(DiffesError, match="memory must be at least 1, got 0"):
        Plans(plans.bench, solver="fitted:memory=0")
    with pytest.raises(DiffesError, match=r"a finite number of at least 0\.\d+ dense calls"):
        plans.space(0.001)
    with pytest.raises(DiffesError, match="nodes must be at least 2, got 1"):
        Plans(plans.bench, nodes=1)
    few = replace(plans.bench, levels=replace(plans.bench.levels, steps=(1, 0, 1, 1)))
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
        plan = plans.searched.plan(space.schedule(space.sample(rng)))
        clock, counted = clock_of(adapter, plan), 0
        with router.routed(plan), adapter.counted_by(clock):
            for clock.index, timestep in enumerate(plan.timesteps):
                counted += macs_per_call(adapter, timestep)
        assert counted / dense == pytest.approx(plans.cost(plan), rel=1e-9)
        assert plans.cost(plan) <= 4.0 + 1e-9
