"""Latents of a dense run at any timestep, and inner products of terms."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from conftest import N_STAGES, small_bank
from diffusers import DDIMScheduler
from torch import Tensor

from diffes.adapters import ModelAdapter
from diffes.measure.metrics import make_metric
from diffes.measure.plan_evaluator import PlanEvaluator
from diffes.measure.reference import Reference, inner_products
from diffes.runtime.router import Router
from diffes.solvers import Noise, NoiseProcess
from diffes.solvers.scheduler import PlanScheduler
from diffes.spaces.plan import trailing
from diffes.spaces.schedule import Stages

PROCESS = NoiseProcess.of(DDIMScheduler())
VISITED = (960, 700, 400, 150)


def drawn(n: int, *shape: int) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def constant() -> tuple[Reference, Tensor, Tensor]:
    """A run whose clean prediction never changes, with that and the noise: latents `a D + s N` at every step."""
    clean, noise = drawn(2, 3, 4, 5, 5)
    noises = PROCESS.along(VISITED)
    return Reference(torch.stack([n.alpha * clean + n.sigma * noise for n in noises]), VISITED, noises), clean, noise


def test_recorded_states_are_given_as_they_are() -> None:
    reference, *_ = constant()
    for state, timestep, noise in zip(reference.states[:-1], VISITED, reference.noises, strict=False):
        assert torch.equal(reference.at(timestep, noise), state)
    assert torch.equal(reference.at(None, reference.noises[-1]), reference.states[-1])
    assert torch.equal(reference.at(999, PROCESS.at(999)), reference.states[0])  # nothing noisier is known


@pytest.mark.parametrize("timestep", [959, 830, 701, 699, 300, 151, 149, 60, 0])
def test_between_steps_with_a_constant_prediction_it_is_exact(timestep: int) -> None:
    reference, clean, noise = constant()
    at = PROCESS.at(timestep)
    torch.testing.assert_close(reference.at(timestep, at), at.alpha * clean + at.sigma * noise, rtol=1e-9, atol=1e-9)


def test_between_two_steps_it_is_between_their_states() -> None:
    """Interpolated latents lie near those of the step at that timestep, whatever the run."""
    states, noises = drawn(len(VISITED) + 1, 1, 4, 5, 5), PROCESS.along(VISITED)
    reference = Reference(states, VISITED, noises)
    for i, timestep in enumerate(VISITED):
        for near in (timestep - 1, timestep + 1)[: 1 + bool(i)]:
            assert (reference.at(near, PROCESS.at(near)) - states[i]).abs().max() < 0.05


def test_an_evaluator_records_every_step_of_its_reference(untrained: ModelAdapter) -> None:
    """Probes in parts give the states of all at once, and these are the states of the run."""
    stages = Stages.equal(N_STAGES)
    router = Router(untrained, small_bank(untrained, "obs", stages))
    recorded: list[Reference] = []
    for batch in (4, 3):
        evaluator = PlanEvaluator(
            router, stages, "fitted", untrained.make_probes(4, 0), guidance=2.0,
            metric=make_metric("latent_mse", untrained.device), reference_steps=6, batch=batch,
        )  # fmt: skip
        assert evaluator.recorded is not None
        recorded.append(evaluator.recorded)
        assert torch.equal(recorded[-1].states[-1], evaluator.final_reference)
    whole, parts = recorded
    assert whole.timesteps == tuple(trailing(6, 1000)) and len(whole.states) == len(whole.noises) == 7
    assert (whole.states - parts.states).norm() < 1e-5 * whole.states.norm()
    assert torch.equal(whole.states[0], untrained.noise(evaluator.probes))
    scheduler = PlanScheduler.of(untrained.pipe.scheduler, whole.timesteps, "dpmsolver++")
    state = untrained.start(evaluator.probes, scheduler, 2.0)
    with torch.no_grad():
        for i in range(3):
            call = untrained.called(state, evaluator.probes, 2.0)
            assert torch.equal(call.latents[:4], whole.states[i])
            state = untrained.advance(state, call)


def test_inner_products_are_summed_in_fp64() -> None:
    """Sums are in fp64: fp32 would lose the small differences of large numbers."""
    terms = [1000 + torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    exact: Sequence[Tensor] = [each.double().flatten() for each in terms]
    found = inner_products(terms[:2], terms[2].bfloat16().float())
    assert found.dtype == torch.float64 and found.shape == (3, 3)
    for i in range(2):
        for j in range(2):
            assert float(found[i, j]) == pytest.approx(float(exact[i] @ exact[j]), rel=1e-14)


def test_the_noise_of_the_process_is_what_a_state_is_taken_at() -> None:
    """Another noise at the same timestep is another state: nothing is read from the timestep alone."""
    reference, clean, noise = constant()
    other = Noise(0.6, 0.8)
    torch.testing.assert_close(reference.at(500, other), 0.6 * clean + 0.8 * noise, rtol=1e-9, atol=1e-9)
