"""Families of text-to-image pipelines: each sampled by its own call, its layers removed exactly."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, pipeline
from masking import assert_dense, masked, state

import diffes
from diffes.adapters import ModelAdapter, adapter_for
from diffes.measure.evaluator import ScheduleEvaluator
from diffes.measure.metrics import make_metric
from diffes.pruning import make_method
from diffes.pruning.build import build_bank
from diffes.pruning.calibration import CalibrationSet
from diffes.runtime.router import Router
from diffes.solvers.scheduler import PlanScheduler
from diffes.spaces.schedule import Schedule, Stages

STAGES = Stages.equal(4)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> ModelAdapter:
    pipe, call = pipeline(request.param)
    adapter = adapter_for(pipe)
    adapter.use_call(call)
    return adapter


def called(adapter: ModelAdapter, n_steps: int, guidance: float) -> torch.Tensor:
    """Images of the pipeline's own call on the first two held-out probes."""
    probes = adapter.make_probes(2, 3, "heldout")
    generators: Any = [torch.Generator().manual_seed(seed) for seed in probes.seeds]
    return adapter.generate(probes.conditions, n_steps=n_steps, guidance=guidance, generator=generators)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_runs_equal_the_pipelines_own_call(family: ModelAdapter, guidance: float) -> None:
    probes = family.make_probes(2, 3, "heldout")
    assert torch.equal(family.decode(family.sample(probes, 4, guidance)), called(family, 4, guidance))


def test_a_run_goes_on_in_the_middle(family: ModelAdapter) -> None:
    """A new call of the pipeline that begins at the latents of another one, at its scheduler's state."""
    probes, process = family.make_probes(2, 3), family.process
    whole = PlanScheduler.of(family.own_scheduler, [900, 600, 300, 100], "dpmsolver++")
    expected = family.sample(probes, whole, 3.0)
    with torch.no_grad():
        at = family.start(probes, whole, 3.0)
        for _ in range(2):
            at = family.step(at, probes, 3.0)
        at = replace(at, drive=None)
        for _ in range(2):
            at = family.step(at, probes, 3.0)
    assert torch.equal(family.finish(at), expected) and process.prediction == whole.config.prediction_type


def test_first_order_steps_are_those_of_the_pipelines_own_scheduler() -> None:
    """Euler's method in the sigmas of flow matching is DDIM's row."""
    for name in ("sd3", "flux"):
        pipe, call = pipeline(name)
        adapter = adapter_for(pipe)
        adapter.use_call(call)
        own = adapter.fresh_scheduler(5)
        timesteps = [round(float(t)) - 1 for t in own.timesteps]
        own.timesteps = torch.tensor(timesteps) + 1.0
        own.sigmas = torch.cat([own.timesteps / 1000, torch.zeros(1)])
        ours = PlanScheduler.of(pipe.scheduler, timesteps, "ddim")
        probes = adapter.make_probes(2, 3)
        found, expected = (adapter.sample(probes, scheduler, 2.0) for scheduler in (ours, own))
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("method", ["magnitude", "obs", "layer_drop"])
def test_what_is_removed_is_removed_exactly(family: ModelAdapter, method: str) -> None:
    """Pruned layers against full ones with zero columns, skipped blocks against blocks whose output is not used."""
    probes = family.make_probes(8, 0)
    data = CalibrationSet(family.noise(probes), probes.conditions, "noise")
    allocation: Any = "equal" if method == "layer_drop" else "sensitivity"
    bank = build_bank(family, make_method(method), STAGES, data, guidance=3.0, seed=0, only=[1], allocation=allocation)
    router, latents, before = Router(family, bank), family.noise(probes[:2]), state(family)
    timesteps = torch.tensor([300, 300])
    for level in range(1, bank.max_level + 1):
        with torch.no_grad(), router.routed(Schedule(STAGES, (0, level, 0, 0), bank.max_level)):
            sliced = family.denoise_once(latents, timesteps, probes.conditions[:2])
        with torch.no_grad(), ExitStack() as stack:
            masked(family, bank, level, stack)
            expected = family.denoise_once(latents, timesteps, probes.conditions[:2])
        torch.testing.assert_close(sliced, expected, rtol=1e-4, atol=1e-4)
    assert_dense(family, before)


def test_outputs_of_earlier_calls_are_reused(family: ModelAdapter) -> None:
    """With everything computed again it is the dense model; with something reused, images differ."""
    probes = family.make_probes(4, 0)
    data = CalibrationSet(family.noise(probes), probes.conditions, "noise")
    bank = build_bank(family, make_method("block_reuse"), STAGES, data, guidance=3.0, seed=0)
    top = bank.max_level
    evaluate = ScheduleEvaluator(
        Router(family, bank), STAGES, probes, n_steps=8, guidance=3.0, metric=make_metric("latent_mse", family.device)
    )
    found = {e.schedule.levels: e.fitness for e in evaluate([Schedule(STAGES, (k,) * 4, top) for k in (0, 1, top)])}
    assert found[0, 0, 0, 0] == 0 > found[1, 1, 1, 1] > found[(top,) * 4]


def test_a_plan_is_fitted_and_runs_in_the_pipeline(family: ModelAdapter) -> None:
    settings: Any = {"probes": 3, "heldout": 2, "reference_steps": 30, "guidance": 2.0}
    found = diffes.fit(family.pipe, [930, 700, 400], call=family.call, **settings)
    assert found.after.latent_mse is not None and found.before.latent_mse is not None
    probes = family.make_probes(2, 3, "heldout")
    planned = PlanScheduler.of(family.own_scheduler, found.plan.timesteps, found.plan.rows)
    expected = family.decode(family.sample(probes, planned, 2.0))
    diffes.apply(family.pipe, found.plan)
    assert torch.equal(called(family, 3, 2.0), expected)
    diffes.remove(family.pipe)


def test_gradients_pass_through_the_pipelines_call() -> None:
    """Of the final latents with respect to a parameter, against finite differences, in double precision."""
    pipe, call = pipeline("sd3")
    adapter = adapter_for(pipe.to(torch.float64))
    adapter.use_call(call)
    bias = adapter.denoiser.proj_out.bias
    probes = adapter.make_probes(2, 3)

    def final() -> torch.Tensor:
        at = adapter.start(probes, PlanScheduler.of(pipe.scheduler, [900, 500, 200], "dpmsolver++"), 3.0)
        for _ in range(3):
            at = adapter.step(at, probes, 3.0)
        return adapter.finish(at).double().square().sum()

    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(final(), [bias])
    with torch.no_grad():
        for i in range(2):
            differences = []
            for h in (1e-2, -1e-2):
                bias[i] += h
                differences.append(float(final()))
                bias[i] -= h
            assert float(gradient[i]) == pytest.approx((differences[0] - differences[1]) / 2e-2, rel=2e-3)
