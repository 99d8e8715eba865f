from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import N_STAGES, images, open_adapter, small_bank
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from diffes.adapters import ModelAdapter, Probes, SamplingState
from diffes.errors import DiffesError
from diffes.measure.currencies import clock_of
from diffes.measure.metrics import make_metric
from diffes.measure.plan_evaluator import PlanEvaluator
from diffes.runtime.router import Router
from diffes.solvers.scheduler import PlanScheduler
from diffes.spaces.plan import PlanSpace, trailing
from diffes.spaces.schedule import Plan, Schedule, Stages

N_NODES = 10
SOLVERS = ["ddim", "dpmsolver++", "fitted", "unipc"]


def evaluator_of(
    adapter: ModelAdapter, solver: str = "dpmsolver++", method: str = "obs", **changes: int
) -> PlanEvaluator:
    stages = Stages.equal(N_STAGES)
    router = Router(adapter, small_bank(adapter, method, stages))
    metric = make_metric("latent_mse", adapter.device)
    settings = {"reference_steps": 12, **changes}
    return PlanEvaluator(router, stages, solver, adapter.make_probes(2, 0), guidance=2.0, metric=metric, **settings)  # type: ignore[arg-type]


def space_of(adapter: ModelAdapter, calls: float | None = 4.0) -> PlanSpace:
    top = adapter.max_level("width")
    return PlanSpace.dense_calls([[1 - 0.9 * k / top for k in range(top + 1)]] * N_NODES, calls)


def test_trailing_timesteps_begin_at_the_noisiest() -> None:
    assert trailing(4, 1000) == [999, 749, 499, 249]
    assert trailing(200, 1000)[0] == 999 and trailing(200, 1000)[-1] == 4


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
def test_prefixes_of_plans_are_shared_and_change_no_bit(untrained: ModelAdapter, solver: str) -> None:
    """Random plans and their neighbours, one after the other with one cache, against each alone."""
    space, rng = space_of(untrained), np.random.default_rng(0)
    plans = [space.sample(rng) for _ in range(4)]
    for plan in list(plans):  # the same beginning, another end
        last = space.called(plan)[0]
        plans.append([1 if node == last else level for node, level in enumerate(plan)])
    schedules = list(dict.fromkeys(space.any_schedule(plan) for plan in plans))
    shared = evaluator_of(untrained, solver)
    found = {e.schedule: e for e in shared(schedules)}
    whole = 0
    for schedule in schedules:
        alone = evaluator_of(untrained, solver)
        (expected,) = alone([schedule])
        assert found[schedule].fitness == expected.fitness
        assert expected.denoiser_calls == 2 * 2 * len(space.called(schedule.levels))
        whole += expected.denoiser_calls
    assert sum(e.denoiser_calls for e in found.values()) == shared.denoiser_calls < whole


@pytest.mark.parametrize("solver", ["dpmsolver++3m", "unipc:order=3"])
def test_prefixes_are_not_shared_where_a_step_knows_how_many_follow(tiny: ModelAdapter, solver: str) -> None:
    """These solvers lower their order at the end: the last call but one is another step than in a longer plan."""
    calls = tuple((t, 0) for t in (999, 800, 600, 400, 200, 100))
    long, short = (Plan(Stages.equal(N_STAGES), each, tiny.max_level("width"), solver) for each in (calls, calls[:-1]))
    shared, alone = (evaluator_of(tiny) for _ in range(2))
    shared.latents(long)
    assert torch.equal(shared.latents(short), alone.latents(short))


def test_evaluators_of_one_model_go_on_where_there_is_no_more_room(
    tiny: ModelAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One finds that only one probe at a time fits; the other one has cached states of both."""
    calls = tuple((t, 0) for t in (999, 700, 400))
    plans = [Plan(Stages.equal(N_STAGES), each, tiny.max_level("width"), "ddim") for each in (calls, calls[:-1])]
    evaluators = [evaluator_of(tiny) for _ in range(2)]
    evaluators[0].latents(plans[0])
    expected, step = evaluator_of(tiny).latents(plans[1]), tiny.step

    def full(state: SamplingState, part: Probes, guidance: float) -> SamplingState:
        if len(part) > 1:
            raise torch.OutOfMemoryError("full")
        return step(state, part, guidance)

    monkeypatch.setattr(tiny, "step", full)
    for evaluator in reversed(evaluators):
        torch.testing.assert_close(evaluator.latents(plans[1]), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["obs+block_reuse", "deep_reuse"])
def test_prefixes_are_shared_with_what_later_calls_reuse(untrained: ModelAdapter, method: str) -> None:
    """Plans that agree up to a call, of which the one reuses there and the other one does not, and a small cache."""
    shared = evaluator_of(untrained, method=method)
    bank, rng = shared.router.bank, np.random.default_rng(0)
    costs = [[1 - 0.9 * k / bank.max_level for k in range(bank.max_level + 1)]] * N_NODES
    space = PlanSpace.dense_calls(costs, 5.0, reusing=bank.reusing)
    plans = [space.sample(rng) for _ in range(3)]
    for plan in list(plans):
        for node in space.called(plan)[:-1][:2]:
            plans += [
                [level if each == node else old for each, old in enumerate(plan)] for level in (0, bank.reusing[0])
            ]
    schedules = list(dict.fromkeys(space.any_schedule(plan) for plan in plans))
    assert any(level in bank.reusing for schedule in schedules for level in schedule.levels)
    alone = [next(evaluator_of(untrained, method=method)([schedule])) for schedule in schedules]
    found = {e.schedule: e for e in shared(schedules)}
    assert [found[e.schedule].fitness for e in alone] == [e.fitness for e in alone]
    assert shared.denoiser_calls < sum(e.denoiser_calls for e in alone)
    again = {e.schedule: e.fitness for e in shared(schedules[::-1])}
    assert all(again[e.schedule] == e.fitness for e in alone)
    assert shared.router.memory is None


def test_a_dense_plan_at_the_solvers_own_timesteps_is_that_run(untrained: ModelAdapter) -> None:
    evaluator, space = evaluator_of(untrained), space_of(untrained, None)
    untrained.pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        untrained.pipe.scheduler.config, algorithm_type="dpmsolver++", timestep_spacing="trailing",
        final_sigmas_type="zero",
    )  # fmt: skip
    own = untrained.sample(evaluator.probes, 5, 2.0)
    dense = [0 if node % 2 else space.skip for node in range(N_NODES)]
    found = evaluator.latents(space.schedule(dense))
    assert (found - own).abs().max() < 1e-5 * own.abs().max()  # the same sums in another order


def test_order_one_is_ddim(untrained: ModelAdapter) -> None:
    config = untrained.pipe.scheduler.config
    untrained.pipe.scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=False)
    probes = untrained.make_probes(2, 0)
    ready = PlanScheduler.of(untrained.pipe.scheduler, [int(t) for t in untrained.timesteps(5)], "ddim")
    ours, theirs = untrained.sample(probes, ready, 2.0), untrained.sample(probes, 5, 2.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_levels_of_a_plan_are_those_of_its_stages(tiny: ModelAdapter) -> None:
    """A plan of one level everywhere equals the schedule of that level, at the same timesteps."""
    evaluator, space = evaluator_of(tiny), space_of(tiny, None)
    genome = space.schedule([2] * N_NODES)
    plan = evaluator.plan(genome)
    assert plan.timesteps == tuple(range(999, 0, -100)) and plan.levels == (2,) * N_NODES
    with evaluator.router.routed(Schedule(evaluator.stages, (2,) * N_STAGES, plan.max_level)):
        expected = tiny.sample(evaluator.probes, evaluator.scheduler(plan), 2.0)
    assert torch.equal(evaluator.latents(genome), expected)


def test_more_dense_calls_come_nearer_to_the_reference(tiny: ModelAdapter) -> None:
    evaluator, space = evaluator_of(tiny, reference_steps=40), space_of(tiny, None)
    scores = [float(evaluator.scores(space.schedule(plan)).mean()) for plan in space.constants()]
    assert scores[-1] > scores[2] > scores[0]


def test_a_plan_refuses_other_timesteps(tiny: ModelAdapter) -> None:
    plan = Plan(Stages.equal(N_STAGES), ((999, 0), (400, 1)), 4, "dpmsolver++")
    router = Router(tiny, small_bank(tiny, "obs", Stages.equal(N_STAGES)))
    probes, ready = tiny.make_probes(1, 0), clock_of(tiny, plan)

    def call(timestep: int) -> None:
        with torch.no_grad():
            tiny.denoise_once(tiny.noise(probes), torch.tensor([timestep]), probes.conditions)

    with router.routed(plan):
        with pytest.raises(DiffesError, match=r"at timestep 999, which is not the next call of the plan"):
            call(999)  # the pipeline's own scheduler does not count it
        with tiny.counted_by(ready):
            call(999)
            for index, timestep in ((0, 500), (0, 400), (1, 999), (2, 400)):
                ready.index = index
                with pytest.raises(DiffesError, match=rf"at timestep {timestep}, .* \(timesteps \[999, 400\]\)"):
                    call(timestep)
    for given in ({"timesteps": [999, 500]}, {"timesteps": [999]}, {"sigmas": [2.0, 1.0]}):
        with pytest.raises(DiffesError, match=r"visits the timesteps \[999, 400\], got .* diffes.remove"):
            ready.set_timesteps(**given)
    with pytest.warns(UserWarning, match=r"makes 2 denoiser calls, so num_inference_steps=20 has no effect here"):
        ready.set_timesteps(20)
    assert ready.timesteps.tolist() == [999, 400]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_pipeline_with_the_planned_scheduler_makes_what_the_evaluator_measures(
    untrained: ModelAdapter, solver: str
) -> None:
    plan = Plan(Stages.equal(N_STAGES), ((999, 1), (700, 0), (400, 2), (80, 1)), untrained.max_level("width"), solver)
    router = Router(untrained, small_bank(untrained, "obs", Stages.equal(N_STAGES)))
    untrained.pipe.scheduler = PlanScheduler.of(untrained.pipe.scheduler, plan.timesteps, solver)
    with router.routed(plan):
        once = images(untrained.pipe, steps=4)
        assert np.array_equal(images(untrained.pipe, steps=4), once)
        with pytest.warns(UserWarning, match="makes 4 denoiser calls, so num_inference_steps=5 has no effect here"):
            assert np.array_equal(images(untrained.pipe, steps=5), once)
    fresh = open_adapter(untrained.pipe.config._name_or_path)
    fresh.pipe.scheduler = PlanScheduler.of(fresh.pipe.scheduler, plan.timesteps, solver)
    assert not np.array_equal(images(fresh.pipe, steps=4), once)  # dense at the same timesteps


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("solver", SOLVERS)
def test_own_loop_of_a_plan_equals_the_pipeline_bit_for_bit(
    untrained: ModelAdapter, solver: str, guidance: float
) -> None:
    plan = Plan(Stages.equal(N_STAGES), ((999, 1), (600, 2), (240, 0)), untrained.max_level("width"), solver)
    router = Router(untrained, small_bank(untrained, "obs", Stages.equal(N_STAGES)))
    planned = PlanScheduler.of(untrained.pipe.scheduler, plan.timesteps, solver)
    probes = Probes((7, 8, 9), tuple(untrained.choices("heldout")[:3]))
    with router.routed(plan):
        sampled = untrained.sample(probes, planned, guidance)
    ours = untrained.decode(sampled)
    with router.routed(plan):
        untrained.pipe.scheduler = planned
        generators: Any = [torch.Generator().manual_seed(seed) for seed in probes.seeds]
        theirs = untrained.generate(probes.conditions, n_steps=3, guidance=guidance, generator=generators)
    assert torch.equal(ours, theirs)


def test_an_unknown_solver_is_refused(tiny: ModelAdapter) -> None:
    with pytest.raises(DiffesError, match=r"unknown solver of plans 'unipcc'.*Did you mean 'unipc'"):
        PlanScheduler.of(tiny.pipe.scheduler, [999], "unipcc")
