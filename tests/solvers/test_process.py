"""Signal and noise of a model's latents, and clean latents from what its network predicts."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import open_adapter
from diffusers import (
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from diffes.errors import DiffesError
from diffes.solvers import END, Noise, NoiseProcess
from diffes.solvers.scheduler import PlanScheduler

TIMESTEPS = (999, 640, 30)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_every_prediction_stands_for_the_clean_latents(prediction: str) -> None:
    clean, noise = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    process = NoiseProcess.of(DDIMScheduler())
    for t in TIMESTEPS:
        at = process.at(t)
        if prediction == "flow_prediction":
            at = Noise(1 - at.sigma, at.sigma)
        latents = at.alpha * clean + at.sigma * noise
        output = {
            "epsilon": noise, "v_prediction": at.alpha * noise - at.sigma * clean, "sample": clean,
            "flow_prediction": noise - clean,
        }[prediction]  # fmt: skip
        torch.testing.assert_close(at.clean(latents, output, prediction), clean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", ["fashion-dit", "emoji-sdxl"])
def test_the_process_is_the_one_that_the_pipeline_adds_noise_by(model: str) -> None:
    adapter = open_adapter(model)
    process, timesteps = NoiseProcess.of(adapter.pipe.scheduler), torch.tensor(TIMESTEPS)
    ones, zeros = torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    signal, noise = adapter.add_noise(ones, zeros, timesteps), adapter.add_noise(zeros, ones, timesteps)
    noises = process.along(TIMESTEPS)
    assert noises[-1] == END and process.prediction == adapter.pipe.scheduler.config.prediction_type
    assert [n.alpha for n in noises[:-1]] == pytest.approx(signal.flatten().tolist(), rel=1e-5)
    assert [n.sigma for n in noises[:-1]] == pytest.approx(noise.flatten().tolist(), rel=1e-5)
    assert 2 * noises[1].log_snr == pytest.approx(adapter.log_snr(640), rel=1e-4)


def test_a_plans_scheduler_has_the_process_of_the_one_that_it_replaces() -> None:
    own = DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")
    process, again = NoiseProcess.of(own), NoiseProcess.of(PlanScheduler.of(own, [999, 40], "ddim"))
    assert (process.alphas == again.alphas).all() and (process.sigmas == again.sigmas).all()
    assert process.prediction == again.prediction == "v_prediction"


def test_a_process_that_ends_in_pure_noise_keeps_a_little_signal() -> None:
    last = NoiseProcess.of(DDIMScheduler(rescale_betas_zero_snr=True)).at(999)
    assert last.alpha == 2.0**-12 and math.isfinite(last.log_snr)
    assert last.alpha**2 + last.sigma**2 == pytest.approx(1)
    assert END.log_snr == math.inf


def test_other_schedulers_and_predictions_are_refused() -> None:
    for scheduler in (EDMEulerScheduler(), EDMDPMSolverMultistepScheduler()):
        with pytest.raises(DiffesError, match=f"{type(scheduler).__name__} does not count in training timesteps"):
            NoiseProcess.of(scheduler)
    with pytest.raises(DiffesError, match="invert_sigmas"):
        NoiseProcess.of(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    with pytest.raises(DiffesError, match=r"prediction_type must be one of epsilon, .*, got 'velocity'"):
        NoiseProcess.of(DDIMScheduler(prediction_type="velocity"))
