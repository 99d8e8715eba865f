from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import N_STAGES, small_bank

from diffes.adapters import ModelAdapter
from diffes.measure.error_table import MeasuredTable, _coordinates, _matched, measure_table
from diffes.measure.metrics import make_metric
from diffes.measure.plan_evaluator import PlanEvaluator
from diffes.runtime.router import Router
from diffes.search.carried import Trajectory
from diffes.search.frontier import front
from diffes.search.plan import PlanSpace
from diffes.search.schedule import Plan, Stages

N_NODES = 16


def bench(
    adapter: ModelAdapter, solver: str = "dpmsolver++", method: str = "obs", **options: object
) -> tuple[PlanEvaluator, PlanSpace]:
    stages = Stages.equal(N_STAGES)
    router = Router(adapter, small_bank(adapter, method, stages))
    metric = make_metric("latent_mse", adapter.device)
    evaluator = PlanEvaluator(
        router, stages, solver, adapter.make_probes(2, 0), guidance=2.0, metric=metric, reference_steps=4
    )
    top = router.max_level
    costs = [[1 - 0.9 * k / top for k in range(top + 1)]] * N_NODES
    return evaluator, PlanSpace.dense_calls(costs, 8.0, reusing=router.bank.reusing, **options)  # type: ignore[arg-type]


def measured(adapter: ModelAdapter, solver: str = "dpmsolver++", **options: object) -> MeasuredTable:
    return measure_table(*bench(adapter, solver, **options))  # type: ignore[arg-type]


def test_a_dense_jump_to_the_next_node_is_the_dense_run_itself(untrained: ModelAdapter) -> None:
    """With a solver of first order: to the next node, and from the last one to the end."""
    found = measured(untrained, "ddim")
    errors = found.table.errors
    far = errors[0, -1, 0]
    for i in range(N_NODES):
        assert errors[i, i + 1, 0] < 1e-6 * far
    assert found.table.start[0] == 0 and (np.diff(found.table.start) != 0).all()


def test_errors_are_those_of_the_solvers_own_steps(tiny: ModelAdapter) -> None:
    """A jump of one thin call against the scheduler that makes just that step from the dense state."""
    evaluator, space = bench(tiny, "ddim")
    found = measure_table(evaluator, space)
    nodes = evaluator.plan(space.any_schedule([0] * N_NODES)).timesteps
    dense = evaluator.scheduler(nodes)
    state = tiny.start(evaluator.probes, dense, 2.0)
    kept = []
    with torch.no_grad():
        for _ in nodes:
            kept.append(state.latents.chunk(2)[0])
            state = tiny.step(state, evaluator.probes, 2.0)
    i, j, level = 0, 5, 2  # from pure noise, where a run can begin
    plan = evaluator.plan(space.any_schedule([level] * N_NODES))
    jump = tiny.start(evaluator.probes, evaluator.scheduler([nodes[i], nodes[j]]), 2.0)
    with torch.no_grad(), evaluator.router.routed(plan):
        jump = tiny.step(jump, evaluator.probes, 2.0)
    expected = float((jump.latents.chunk(2)[0] - kept[j]).square().mean())
    assert found.table.errors[i, j, level] == pytest.approx(expected * found.growth[j], rel=1e-3)


def test_calls_are_counted_and_few(tiny: ModelAdapter) -> None:
    found = measured(tiny)
    levels = tiny.max_level("width") + 1
    assert found.calls >= 2 * 2 * N_NODES * levels
    assert measured(tiny, allowed=(0,)).calls < found.calls
    assert np.isnan(measured(tiny, allowed=(0,)).table.errors[:, :, 1:]).all()


def test_it_is_the_same_again_and_leaves_the_model_dense(tiny: ModelAdapter) -> None:
    evaluator, space = bench(tiny)
    probes = evaluator.probes
    before = tiny.sample(probes, 4, 2.0)
    one, other = measure_table(evaluator, space), measure_table(evaluator, space)
    assert np.array_equal(one.table.errors, other.table.errors, equal_nan=True)
    assert np.array_equal(one.growth, other.growth) and one.growth[-1] == 1
    assert torch.equal(tiny.sample(probes, 4, 2.0), before)


def test_jumps_of_second_order_are_the_schedulers_own(tiny: ModelAdapter) -> None:
    """From the dense state at a node, with the dense prediction that lies as far behind in the solver's memory."""
    evaluator, space = bench(tiny)
    found = measure_table(evaluator, space)
    nodes = evaluator.plan(space.any_schedule([0] * N_NODES)).timesteps
    scheduler = evaluator.scheduler(nodes)
    state = tiny.start(evaluator.probes, scheduler, 2.0)
    kept = []
    with torch.no_grad():
        for _ in nodes:
            kept.append(state.latents)
            state = tiny.step(state, evaluator.probes, 2.0)
    signal, noise = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[:-1])
    logs = signal.log() - noise.log()
    i, j, level = 7, 10, 2
    p = int((logs[i] - logs[:i] - (logs[j] - logs[i])).abs().argmin())
    calls = ((nodes[p], 0), (nodes[i], level), (nodes[j], 0))
    jump = replace(tiny.start(evaluator.probes, evaluator.scheduler([t for t, _ in calls]), 2.0), latents=kept[p])
    with torch.no_grad(), evaluator.router.routed(Plan(evaluator.stages, calls, 4, "dpmsolver++")):
        jump = replace(tiny.step(jump, evaluator.probes, 2.0), latents=kept[i])
        jump = tiny.step(jump, evaluator.probes, 2.0)
    expected = float((jump.latents - kept[j]).square().mean())
    assert found.table.errors[i, j, level] == pytest.approx(expected * found.growth[j], rel=1e-3)


def test_what_is_carried_along_is_the_dense_run(tiny: ModelAdapter) -> None:
    """Coordinates keep distances; a dense plan of all nodes is forecast to end where the dense run does."""
    for solver in ("dpmsolver++", "ddim"):
        evaluator, space = bench(tiny, solver)
        run = measure_table(evaluator, space).run
        scheduler = evaluator.scheduler(evaluator.plan(space.any_schedule([0] * N_NODES)).timesteps)
        final = evaluator.dense_latents(scheduler)
        moved = float((final - tiny.start(evaluator.probes, scheduler, 2.0).latents.chunk(2)[0]).square().mean())
        assert float(np.square(run.states[-1] - run.states[0]).sum()) == pytest.approx(moved, rel=1e-4)
        assert run.predict([0] * N_NODES).error < 1e-6 * moved
        assert run.reaction.shape == (N_NODES,) and 0.5 < run.reaction[-1] < 2


def test_coordinates_keep_inner_products_and_mark_what_is_infinite() -> None:
    vectors = np.random.default_rng(0).normal(size=(4, 9))
    vectors[2] = vectors[0] - vectors[1]
    found = _coordinates(vectors @ vectors.T)
    assert found.shape == (4, 3) and found @ found.T == pytest.approx(vectors @ vectors.T)
    vectors[3, 5] = np.inf
    with np.errstate(invalid="ignore"):
        found = _coordinates(vectors @ vectors.T)
    assert np.isnan(found[3]).all() and found[:3] @ found[:3].T == pytest.approx(vectors[:3] @ vectors[:3].T)


def test_a_reaction_is_made_to_grow_as_was_measured() -> None:
    signals = np.array([0.1, 0.5, 0.8, 1.0])
    noises, reaction = np.sqrt(1 - signals**2), np.array([0.1, 0.4, 0.7])
    points = np.zeros((4, 1))
    run = Trajectory(points, np.zeros((3, 1, 1)), signals, noises, reaction, np.ones((3, 1)), second=True)
    factors = noises[1:] / noises[:-1] * (1 - signals[:-1] * 1.2 * reaction) + signals[1:] * 1.2 * reaction
    growth = np.append(np.square(factors)[::-1].cumprod()[::-1], 1.0)
    assert _matched(run, growth) == pytest.approx(1.2 * reaction)


def test_forecasts_are_near_what_plans_do(tiny: ModelAdapter) -> None:
    """Of carried latents, against runs of random plans and the dense run over all nodes."""
    evaluator, space = bench(tiny)
    run = measure_table(evaluator, space).run
    final = evaluator.latents(space.any_schedule([0] * N_NODES))
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(12):
        genome = space.schedule(space.sample(rng))
        true = float((evaluator.latents(genome) - final).square().mean())
        ratios.append(run.predict(genome.levels).error / true)
    assert 0.5 < np.median(ratios) < 2 and np.abs(np.log(ratios)).max() < 1.5


def test_plans_of_the_table_are_better_than_even_ones(tiny: ModelAdapter) -> None:
    """Dense plans from the table against evenly spaced ones of the same cost, on the probes of the table."""
    evaluator, space = bench(tiny, allowed=(0,))
    found = measure_table(evaluator, space)
    plans = {round(f.cost): f for f in front(found.table, 8.0, resolution=8, allowed=(0,))}
    reference = evaluator.dense_latents(evaluator.scheduler(range(999, 0, -10)))
    ahead = 0
    for calls, forecast in plans.items():
        even = space.any_schedule(space._trailing(calls, 0))
        errors = [
            float((evaluator.latents(genome) - reference).square().mean())
            for genome in (space.any_schedule(forecast.levels), even)
        ]
        ahead += errors[0] <= errors[1]
    assert len(plans) >= 6 and ahead >= len(plans) - 2


@pytest.mark.parametrize("method", ["block_reuse", "obs+deep_reuse"])
def test_levels_that_reuse_are_measured_after_calls_some_nodes_before(untrained: ModelAdapter, method: str) -> None:
    """What the table says of a plan of two calls, the second reusing of the first, against that plan's own run."""
    if "deep" in method and untrained.up_layers() is None:
        return
    evaluator, space = bench(untrained, "ddim", method)
    found = measure_table(evaluator, space)
    run, levels = found.run, np.array(space.reusing)
    assert (run.reusing == levels).all() and np.isnan(run.data[:, levels]).all()
    assert run.reused.shape[:3] == (N_NODES, len(levels), len(run.gaps)) and np.isfinite(run.reused).all()
    assert np.isnan(found.table.errors[:, :, levels]).all()
    rows = 2 * 2 * N_NODES
    assert found.calls > rows * len(space.first_levels) + rows * len(levels) * len(run.gaps) * 0.9
    final = evaluator.latents(space.any_schedule([0] * N_NODES))
    for gap in run.gaps.tolist():
        for level in levels.tolist():
            genome = [space.skip] * N_NODES
            genome[N_NODES - 1], genome[N_NODES - 1 - gap] = 0, level
            true = float((evaluator.latents(space.schedule(genome)) - final).square().mean())
            assert run.predict(genome).error == pytest.approx(true, rel=0.35)
