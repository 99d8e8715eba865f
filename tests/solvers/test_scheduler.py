"""The scheduler of a plan: against diffusers' own on real models, and as a part of a pipeline."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import images, open_adapter, open_pipe
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionXLImg2ImgPipeline
from torch import Tensor

import diffes
from diffes.errors import DiffesError
from diffes.runtime.apply import put_scheduler
from diffes.solvers.offtheshelf import spaced
from diffes.solvers.scheduler import PlanScheduler
from diffes.spaces.schedule import Plan, Stages

PLAN = [999, 870, 610, 340, 90]
OWN = DDIMScheduler(clip_sample=False)


def outputs(n: int = len(PLAN)) -> Tensor:
    """Return random latents for the first call, then a random output of the network for each call."""
    return torch.randn(n + 1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def walked(scheduler: PlanScheduler, latents: Tensor | None = None) -> Tensor:
    """Final latents of a run from where the scheduler is, and from given latents or the first."""
    start, *rest = outputs(len(scheduler.plan))
    latents = start if latents is None else latents
    for i in range(scheduler.index, len(scheduler.plan)):
        output = rest[i].to(latents.dtype)
        latents = scheduler.step(output, scheduler.timesteps[i], latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpmsolver++", 2)])
@pytest.mark.parametrize("model", ["fashion-dit", "emoji-sdxl"])
def test_a_run_is_that_of_diffusers_up_to_rounding(model: str, solver: str, order: int, guidance: float) -> None:
    adapter = open_adapter(model)
    own: Any = adapter.pipe.scheduler
    config = own.config | {"use_karras_sigmas": False, "thresholding": False}
    theirs = DPMSolverMultistepScheduler.from_config(
        config, algorithm_type="dpmsolver++", solver_order=order, final_sigmas_type="zero"
    )
    theirs.set_timesteps(timesteps=np.array(PLAN))
    probes = adapter.make_probes(2, 5)
    ours = adapter.sample(probes, PlanScheduler.of(own, PLAN, solver), guidance)
    expected = adapter.sample(probes, theirs, guidance)
    assert (ours - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["fashion-dit", "emoji-sdxl"])
@pytest.mark.parametrize("spacing", ["trailing", "log-snr"])
def test_a_run_by_unipc_is_near_that_of_many_steps(model: str, spacing: str) -> None:
    """A solver of higher order at as many calls: nearer than DDIM to where 100 steps lead."""
    adapter = open_adapter(model)
    own: Any = adapter.pipe.scheduler
    probes = adapter.make_probes(2, 5)

    def final(solver: str, n: int, spacing: str) -> Tensor:
        return adapter.sample(probes, PlanScheduler.of(own, spaced(own, n, spacing), solver), 1.0)

    reference = final("dpmsolver++", 100, "trailing")
    ddim, unipc = ((final(solver, 10, spacing) - reference).norm() for solver in ("ddim", "unipc"))
    assert unipc < ddim


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++", "dpmsolver++3m", "unipc", "fitted"])
def test_copies_give_the_same_bits_at_the_start_and_in_the_middle(solver: str) -> None:
    start, *rest = outputs()
    for done in (0, 3):
        scheduler, latents = PlanScheduler.of(OWN, PLAN, solver), start
        for i in range(done):
            latents = scheduler.step(rest[i], PLAN[i], latents).prev_sample
        copies = [copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))]
        expected = walked(scheduler, latents)
        for each in copies:
            assert each.index == done, "a copy is stepped with what it was made of"
            assert torch.equal(walked(each, latents), expected)


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++3m", "unipc"])
def test_a_scheduler_of_its_own_is_saved_and_opened(solver: str, tmp_path: Path) -> None:
    made = PlanScheduler.of(DDIMScheduler(prediction_type="v_prediction"), PLAN, solver)
    expected = walked(made)
    made.replaces = None
    made.save_pretrained(tmp_path)
    opened = PlanScheduler.from_pretrained(tmp_path)
    assert opened.timesteps.tolist() == PLAN and opened.coefficients == made.coefficients
    assert torch.equal(walked(opened), expected)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "PlanScheduler"


def test_a_configuration_makes_the_same_scheduler() -> None:
    made = PlanScheduler.of(OWN, PLAN, "dpmsolver++")
    again = PlanScheduler.from_config(made.config)
    assert (again.plan, again.coefficients, again.noises) == (made.plan, made.coefficients, made.noises)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_keep_their_dtype_and_are_summed_in_fp32(dtype: torch.dtype) -> None:
    scheduler = PlanScheduler.of(OWN, PLAN, "dpmsolver++")
    start = outputs()[0]
    half = walked(scheduler, start.to(dtype))
    assert half.dtype == dtype and [each.dtype for each in scheduler._clean] == [torch.float32]
    scheduler.set_timesteps()
    assert (half.float() - walked(scheduler)).norm() < 0.02 * half.float().norm()
    scheduler.set_timesteps()
    output = outputs()[1].to(dtype)
    row = scheduler.coefficients[0]
    exact = row[0] * start.to(dtype).float() + row[1] * scheduler.clean(output, start.to(dtype))
    assert torch.equal(scheduler.step(output, PLAN[0], start.to(dtype)).prev_sample, exact.to(dtype))


def test_another_number_of_steps_is_replaced_with_one_warning() -> None:
    scheduler = PlanScheduler.of(OWN, PLAN, "ddim")
    with pytest.warns(
        UserWarning, match=r"makes 5 denoiser calls, so num_inference_steps=20 has no effect here"
    ) as said:
        scheduler.set_timesteps(20)
    assert len(said) == 1 and said[0].filename == __file__
    assert scheduler.timesteps.tolist() == PLAN and scheduler.num_inference_steps == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.set_timesteps(5)
        scheduler.set_timesteps(timesteps=PLAN)
        scheduler.set_timesteps(20, timesteps=PLAN)
        scheduler.set_timesteps()


@pytest.mark.parametrize(
    "given", [{"timesteps": PLAN[:-1]}, {"timesteps": [999]}, {"timesteps": []}, {"sigmas": [3.0, 1.0]}]
)
def test_other_timesteps_and_sigmas_are_refused(given: dict[str, Any]) -> None:
    scheduler = PlanScheduler.of(OWN, PLAN, "ddim")
    with pytest.raises(DiffesError, match=r"visits the timesteps \[999, 870, 610, 340, 90\], got (timesteps|sigmas)"):
        scheduler.set_timesteps(**given)


def test_a_step_after_the_last_is_refused_until_a_run_begins_again() -> None:
    scheduler = PlanScheduler.of(OWN, PLAN, "dpmsolver++")
    once = walked(scheduler)
    assert scheduler.index == 5
    with pytest.raises(DiffesError, match=r"all 5 calls of the applied plan are made\. Call set_timesteps"):
        scheduler.step(once, 90, once)
    scheduler.set_timesteps(5)
    assert scheduler.index == 0 and torch.equal(walked(scheduler), once)


def test_a_run_that_broke_off_leaves_nothing_for_the_next() -> None:
    scheduler = PlanScheduler.of(OWN, PLAN, "dpmsolver++3m")
    expected = walked(scheduler)
    scheduler.set_timesteps()
    scheduler.step(outputs()[4], 999, outputs()[5])
    scheduler.set_timesteps()
    assert torch.equal(walked(scheduler), expected)


def test_a_step_returns_a_tuple_where_it_is_asked_to() -> None:
    scheduler, (start, output) = PlanScheduler.of(OWN, [700], "ddim"), outputs(1)
    found, again = scheduler.step(output, 700, start, return_dict=False)
    assert again is found
    assert torch.equal(found, scheduler.noises[0].clean(start, output, "epsilon"))


def test_noise_is_added_as_the_pipelines_own_scheduler_does() -> None:
    scheduler = PlanScheduler.of(OWN, PLAN, "ddim")
    clean, noise, timesteps = outputs()[0], outputs()[1], torch.tensor([340, 999])
    torch.testing.assert_close(
        scheduler.add_noise(clean, noise, timesteps), OWN.add_noise(clean, noise, timesteps), rtol=1e-5, atol=1e-6
    )
    assert scheduler.add_noise(clean.half(), noise.half(), timesteps).dtype == torch.float16
    with pytest.raises(DiffesError, match=r"visits the timesteps \[999, 870, 610, 340, 90\], not 500"):
        scheduler.add_noise(clean, noise, torch.tensor([999, 500]))


def test_a_run_goes_on_where_one_of_another_plan_was_left() -> None:
    """The copy continues as if it had made the calls itself; the original does not change."""
    (start, *rest), other = outputs(), [*PLAN[:3], 200, 10]
    before, ready = (PlanScheduler.of(OWN, plan, "dpmsolver++3m") for plan in (PLAN, other))
    before.coefficients[1] = tuple(1.5 * each for each in before.coefficients[1])  # as a fit would
    latents = start
    for i in range(2):
        latents = before.step(rest[i], PLAN[i], latents).prev_sample
    resumed = ready.resumed(before)
    assert (resumed.index, resumed.plan, resumed.replaces) == (2, tuple(other), OWN)
    assert resumed.coefficients == [*before.coefficients[:2], *ready.coefficients[2:]]
    assert (ready.index, before.index) == (0, 2)
    ready.coefficients[1] = before.coefficients[1]
    expected = walked(ready)
    assert torch.equal(walked(resumed, latents), expected)
    assert torch.equal(walked(before, latents), walked(PlanScheduler.of(OWN, PLAN, before.coefficients)))


FINE = ((0.5, 0.5), (0.5, 0.25, 0.25), (0.0, 1.0))
BAD_ROWS: list[tuple[Any, str]] = [
    ((FINE[0], (float("nan"), 1.0), FINE[2]), r"row 1 of the coefficients must have finite numbers, got \[nan, 1.0\]"),
    ((FINE[0], FINE[1], (0.0, float("inf"))), r"row 2 of the coefficients must have finite numbers"),
    ((FINE[0], FINE[1], (0.0, "1")), r"row 2 of the coefficients must have finite numbers"),
    (FINE[:2], "a plan of 3 calls needs 3 rows of coefficients, got 2"),
    ((*FINE, FINE[2]), "a plan of 3 calls needs 3 rows of coefficients, got 4"),
    (((0.5, 0.25, 0.25), *FINE[1:]), r"row 0 of the coefficients must have 2 to 2 numbers, got 3"),
    ((FINE[0], (0.5,), FINE[2]), r"row 1 of the coefficients must have 2 to 3 numbers, got 1"),
    ((FINE[0], FINE[1], ()), r"row 2 of the coefficients must have 2 to 4 numbers, got 0"),
]


@pytest.mark.parametrize(("rows", "said"), BAD_ROWS)
def test_bad_coefficients_are_refused(rows: Any, said: str) -> None:
    plan = [900, 500, 100]
    with pytest.raises(DiffesError, match=said):
        PlanScheduler.of(OWN, plan, rows)
    with pytest.raises(DiffesError, match=said):
        Plan(Stages.equal(4), tuple((t, 0) for t in plan), 4, "fitted", rows)
    data = {"stages": [[0, 1000]], "timesteps": plan, "levels": [0] * 3, "max_level": 4, "solver": "fitted"}
    with pytest.raises(DiffesError, match=said):
        Plan.from_json({**data, "coefficients": rows})
    assert Plan.from_json({**data, "coefficients": [list(row) for row in FINE]}).coefficients == FINE


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prediction_type": "velocity"}, "prediction_type must be one of epsilon, .*, got 'velocity'"),
        ({"alphas": (0.5,)}, "a plan of 2 calls needs 2 alphas and sigmas, got 1 and 2"),
        ({"sigmas": (0.5,) * 3}, "a plan of 2 calls needs 2 alphas and sigmas, got 2 and 3"),
        ({"plan": (500, 900)}, r"must be below the one before, got \[500, 900\]"),
        ({"plan": (500, 500)}, r"must be below the one before"),
        ({"plan": (1000, 500)}, r"one or more timesteps, all in \[0, 999\], got \[1000, 500\]"),
        ({"plan": (500, -1)}, r"all in \[0, 999\]"),
        ({"plan": (500.5, 100)}, r"must be whole numbers, got \[500\.5, 100\]"),
        ({"plan": ()}, r"needs a plan, and got none"),
        ({"num_train_timesteps": 900}, r"all in \[0, 899\]"),
        ({"sigmas": (float("nan"), 0.5)}, r"sigmas in \[0, 1\]"),
    ],
)
def test_other_bad_arguments_are_refused(changes: dict[str, Any], said: str) -> None:
    fine: dict[str, Any] = {
        "plan": (900, 500), "coefficients": ((0.5, 0.5), (0.0, 1.0)), "alphas": (0.2, 0.6), "sigmas": (0.9, 0.8),
    }  # fmt: skip
    PlanScheduler(**fine)
    with pytest.raises(DiffesError, match=said):
        PlanScheduler(**fine | changes)


OPENED = """
import sys
from diffusers import DiffusionPipeline
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    print(type(pipe.scheduler).__name__, type(pipe.scheduler).__module__.split(".")[0], "diffes" in sys.modules)
"""


@pytest.mark.slow
def test_a_pipeline_with_a_plan_is_saved_with_its_own_scheduler(
    tiny_folder: Path, tiny_sdxl_folder: Path, tmp_path: Path
) -> None:
    """And opens where there is no diffes; the plan goes on, and the pipeline is saved likewise when it is gone."""
    folders = []
    for model in (tiny_folder, tiny_sdxl_folder):
        pipe = open_pipe(model)
        own = pipe.scheduler
        put_scheduler(pipe, PlanScheduler.of(own, PLAN, "dpmsolver++"))
        pipe.save_pretrained(tmp_path / "put" / model.name)
        assert isinstance(pipe.scheduler, PlanScheduler)
        put_scheduler(pipe, own)
        diffes.apply(pipe, Plan(Stages.equal(4), tuple((t, 0) for t in PLAN), 4, "unipc"))
        pipe.save_pretrained(tmp_path / "applied" / model.name)
        diffes.remove(pipe)
        assert pipe.scheduler is own
        pipe.save_pretrained(tmp_path / "removed" / model.name)
        for name in ("put", "applied", "removed"):
            folder, config = tmp_path / name / model.name, "scheduler/scheduler_config.json"
            assert json.loads((folder / config).read_text()) == json.loads((model / config).read_text())
            index = json.loads((folder / "model_index.json").read_text())
            assert index["scheduler"] == ["diffusers", type(own).__name__]
        folders.append(tmp_path / "applied" / model.name)
    run = subprocess.run(
        [sys.executable, "-c", OPENED, *map(str, folders)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines() == ["DDIMScheduler diffusers False", "EulerDiscreteScheduler diffusers False"]


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++", "unipc"])
def test_a_run_may_begin_at_a_later_call(tiny_sdxl_folder: Path, solver: str) -> None:
    """An image to begin with: the third call is the first, and the next image from noise is what it was."""
    pipe: Any = open_pipe(tiny_sdxl_folder)
    diffes.apply(pipe, Plan(Stages.equal(4), tuple((t, 0) for t in PLAN), 4, solver))
    before = images(pipe, steps=5)
    other = StableDiffusionXLImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    made = other("a cat", image=image, strength=0.6, num_inference_steps=5, output_type="np").images
    assert np.isfinite(made).all() and pipe.scheduler.index == 5
    assert np.array_equal(images(pipe, steps=5), before)


def test_a_copy_of_a_pipeline_with_a_plan_runs_it_too(tiny_model: Path) -> None:
    """Each counts its own calls."""
    pipe: Any = open_pipe(tiny_model)
    diffes.apply(pipe, Plan(Stages.equal(4), tuple((t, 0) for t in PLAN), 4, "dpmsolver++"))
    made = copy.deepcopy(pipe)
    expected = images(pipe, steps=5)
    assert made.scheduler.index == 0 and pipe.scheduler.index == 5
    assert np.array_equal(images(made, steps=5), expected)
    assert type(diffes.remove(made).scheduler) is type(diffes.remove(pipe).scheduler)


def test_a_run_is_applied_over_a_plan(run: Path, tiny_folder: Path) -> None:
    """The state before the plan is restored."""
    pipe, other = open_pipe(tiny_folder), open_pipe(tiny_folder)
    own, expected = pipe.scheduler, images(diffes.apply(other, run))
    diffes.apply(pipe, Plan(Stages.equal(4), tuple((t, 0) for t in PLAN), 4, "dpmsolver++"))
    assert not np.array_equal(images(pipe, steps=5), expected)
    assert np.array_equal(images(diffes.apply(pipe, run)), expected)
    assert pipe.scheduler is own
    diffes.remove(pipe)
    assert pipe.scheduler is own


def test_a_run_that_began_later_is_followed_by_a_whole_one() -> None:
    """As with diffusers' schedulers, of which `set_timesteps` forgets where the run before began."""
    scheduler = PlanScheduler.of(OWN, PLAN, "ddim")
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)
    assert scheduler.index == 2
    scheduler.set_timesteps(5)
    assert scheduler.index == 0
