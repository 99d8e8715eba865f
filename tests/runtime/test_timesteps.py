"""Denoiser calls whose timestep does not say where sampling is: refused.

Tests with the mark `feature` are rows of `benchmarks/results/router_features.md`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import images, open_adapter, open_pipe, small_bank
from diffusers import (
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from test_changed_models import call, evaluator, thin

import diffes
from diffes.adapters import ModelAdapter
from diffes.adapters.dit import DiTAdapter
from diffes.errors import DiffesError
from diffes.pruning.calibration import load_calibration
from diffes.runtime.router import Router
from diffes.spaces.schedule import Stages

feature = pytest.mark.feature


def continuous(pipe: Any) -> Any:
    return EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True
    )


OTHER = [continuous, lambda _: EDMEulerScheduler(), lambda _: EDMDPMSolverMultistepScheduler()]


@feature("samplers that do not count in training timesteps (EDM, continuous Euler)", "refused")
@pytest.mark.parametrize("scheduler", OTHER)
def test_samplers_that_do_not_count_in_training_timesteps_are_refused(
    run: Path, tiny_folder: Path, stages: Stages, scheduler: Any
) -> None:
    pipe = open_pipe(tiny_folder)
    own, other = pipe.scheduler, scheduler(pipe)
    before = images(pipe)
    pipe.scheduler = other
    with pytest.raises(DiffesError, match="does not count in training timesteps"):
        diffes.apply(pipe, run)
    adapter = open_adapter(str(tiny_folder))
    adapter.pipe.scheduler = other
    router = Router(adapter, small_bank(adapter, "magnitude", stages, [1]))
    with pytest.raises(DiffesError, match="does not count in training timesteps"):
        evaluator(router, stages)
    pipe.scheduler = own
    diffes.apply(pipe, run)
    pipe.scheduler = other
    with pytest.raises(DiffesError, match="does not count in training timesteps"):
        call(diffes.adapters.adapter_for(pipe))
    pipe.scheduler = own
    np.testing.assert_array_equal(images(diffes.remove(pipe)), before)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler, LCMScheduler, PNDMScheduler])
def test_samplers_that_do_are_not(tiny: ModelAdapter, scheduler: Any, steps: int) -> None:
    for spacing in ("leading", "trailing", "linspace"):
        tiny.pipe.scheduler = scheduler.from_config(tiny.pipe.scheduler.config, timestep_spacing=spacing)
        tiny.check_sampler()


@feature("denoisers that take other times than the sampler's (Lumina's 1 - t), in searches", "refused")
def test_an_adapter_that_does_not_translate_times_is_refused_before_the_search(
    tiny: ModelAdapter, stages: Stages
) -> None:
    class Backwards(DiTAdapter):
        time_scale = 3.0

    adapter = Backwards(tiny.pipe)
    router = Router(adapter, small_bank(tiny, "magnitude", stages, [1]))
    with pytest.raises(DiffesError, match=r"Backwards.timestep said 250 for .* timestep 750"):
        evaluator(router, stages)


@feature("negative timesteps, from samplers that a pipeline does not know of", "refused")
@feature("rows of a batch at different timesteps", "refused")
def test_calls_that_are_in_no_stage_or_in_two_are_refused(tiny: ModelAdapter, stages: Stages) -> None:
    router = Router(tiny, small_bank(tiny, "magnitude", stages, [1]))
    probes = tiny.make_probes(2, 0)
    with router.routed(thin(stages, 2)):
        with pytest.raises(DiffesError, match="have timesteps from 10 to 300"):
            tiny.denoise_once(tiny.noise(probes), torch.tensor([300, 10]), probes.conditions)
        with pytest.raises(DiffesError, match=r"called at -0.5"):
            tiny.denoise_once(tiny.noise(probes), torch.tensor([-0.5, -0.5]), probes.conditions)


@feature("a dense reference that is NaN or infinite, in searches", "refused")
@pytest.mark.parametrize(("metric", "value"), [("psnr", float("nan")), ("latent_mse", float("inf"))])
def test_a_reference_that_is_no_number_is_refused(
    tiny: ModelAdapter, stages: Stages, metric: str, value: float
) -> None:
    router = Router(tiny, small_bank(tiny, "magnitude", stages, [1]))
    broken: Any = tiny.denoiser.proj_out_2 if metric == "latent_mse" else tiny.pipe.vae.decoder.conv_out
    broken.bias.data.fill_(value)
    with pytest.raises(DiffesError, match=r"of the dense model are NaN or infinite.*choose dtype bfloat16"):
        evaluator(router, stages, metric)


@feature("a dense reference that is NaN or infinite, in searches", "refused")
def test_images_that_become_no_numbers_are_refused(tiny_sdxl: ModelAdapter) -> None:
    pipe: Any = tiny_sdxl.pipe
    pipe.vae.encoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(DiffesError, match=r"latents for calibration \(calibration.npz\) are NaN"):
        load_calibration(tiny_sdxl, Path(pipe.config._name_or_path) / "calibration.npz", 4)
