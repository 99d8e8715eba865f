"""Plans for pipeline objects, of classes that diffes has no adapter for."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Counting, make_run, open_pipe
from diffusers import (
    DDPMPipeline,
    EDMEulerScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from families import ddpm, latte, pipeline

import diffes
from diffes.adapters import ModelAdapter, adapter_for
from diffes.errors import DiffesError, DiffesWarning
from diffes.solvers.scheduler import PlanScheduler
from diffes.spaces.schedule import Plan, Stages
from diffes.study.functions import Front
from diffes.study.run import sample_images

VIDEO = {"prompt": ["a fox", "a hen"], "height": 16, "width": 16, "video_length": 2, "clean_caption": False}
SMALL: dict[str, Any] = {"max_evals": 4, "probes": 2, "heldout": 2, "fit_probes": 2, "reference_steps": 12}


def quiet(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def counted(module: torch.nn.Module, call: Callable[[], object]) -> int:
    """Count the calls of a module."""
    calls: list[object] = []
    handle = module.register_forward_hook(lambda *_: calls.append(None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DiffesWarning)
        call()
    handle.remove()
    return len(calls)


def test_a_video_pipeline_runs_a_fitted_plan() -> None:
    pipe, progress = quiet(latte), Counting()
    found = diffes.search(pipe, calls=3, call=VIDEO, progress=progress, **SMALL)
    assert any("denoiser calls on one image each" in title for title in progress.titles)
    assert {point.kind for point in found.points} == {"dense", "off-the-shelf", "dense-planned", "dense-fitted"}
    assert all(point.latent_mse is not None and point.image_mse is None for point in found.points)
    assert found.record.guidance == 7.5  # that of the pipeline's own default
    diffes.apply(pipe, found)
    call = VIDEO | {"prompt": "a fox", "output_type": "latent"}
    assert counted(pipe.transformer, lambda: pipe(**call)) == 3
    with pytest.warns(
        DiffesWarning, match=r"made for latents of shape \(4, 2, 4, 4\), and this call has \(4, 2, 8, 4\)"
    ):
        pipe(**call | {"height": 32})
    diffes.remove(pipe)
    assert counted(pipe.transformer, lambda: pipe(**call, num_inference_steps=2)) == 2


def test_pruned_calls_are_searched_for_a_pipeline_object() -> None:
    """Every stage is calibrated, also those that the pipeline's shifted steps leave out."""
    pipe, call = pipeline("z_image")
    options: dict[str, Any] = {"stages": 8, "calibration_samples": 4, "method": "wanda", **SMALL}
    found = diffes.search(pipe, calls=2, call=call, progress=Counting(), **options)
    assert "joint" in {point.kind for point in found.points}
    assert min(adapter_for(pipe).timesteps(20)) > 125
    diffes.apply(pipe, found)
    assert counted(pipe.transformer, lambda: pipe(**call | {"prompt": "a fox", "output_type": "latent"})) >= 2
    diffes.remove(pipe)


def test_heads_that_stay_are_named() -> None:
    pipe, call = pipeline("ltx")
    options: dict[str, Any] = {"stages": 2, "method": "magnitude", "progress": (progress := Counting()), **SMALL}
    diffes.search(pipe, calls=2, call=call, **options)
    said = "the heads of 2 attention layers stay, because a norm runs across all of them: transformer_blocks.0.attn1"
    assert any(title.startswith(said) for title in progress.titles)


def test_a_pipeline_without_conditions_and_a_folder(tmp_path: Path) -> None:
    pipe = quiet(ddpm)
    options: dict[str, Any] = {"model": pipe, "calls": 2, "progress": Counting(), **SMALL}
    found = diffes.search(tmp_path / "run", **options)
    again = diffes.search(tmp_path / "run", **options)  # finished: it is read
    assert isinstance(found, Front) and isinstance(again, Front)
    assert found.record == again.record and found.record.model == "DDPMPipeline"
    assert all(point.image_mse is not None for point in found.points)
    pipe.to(torch.float32)
    diffes.apply(pipe, tmp_path / "run")
    assert counted(pipe.unet, lambda: pipe(output_type="np")) == 2
    diffes.remove(pipe)


def test_a_result_without_a_folder_lives_as_long_as_it_is_used() -> None:
    pipe = quiet(ddpm)
    found = diffes.search(pipe, calls=1, progress=Counting(), **SMALL)
    folder = found.out
    assert folder.is_dir()
    del found
    gc.collect()
    assert not folder.exists()


def test_every_second_prompt_is_held_out() -> None:
    adapter = adapter_for(quiet(latte))
    adapter.use_call(VIDEO | {"prompt": ["a", "b", "c", "d", "e"]})
    assert adapter.choices("search") == ["a", "c", "e"] and adapter.choices("heldout") == ["b", "d"]
    adapter.use_call(VIDEO | {"prompt": "alone"})
    assert adapter.choices("search") == adapter.choices("heldout") == ["alone"]


class Stubborn(DDPMPipeline):  # type: ignore[misc]
    """Makes no steps of its scheduler."""

    def __call__(self, generator: Any = None, num_inference_steps: int = 5) -> Any:
        return self.unet(torch.zeros(1, 3, 16, 16), 5)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"call": {"heigth": 8}}, "LattePipeline takes no argument 'heigth'; it takes prompt"),
    ({"call": {"num_inference_steps": 8}}, "leave num_inference_steps out of the call: a plan says how many"),
    ({"call": {"latents": None}}, "leave latents out of the call: every probe has noise of its own"),
    ({"workers": 2}, "workers=2 load the model by its name, and a pipeline object was given"),
    ({"call": {"guidance_scale": 2.0}, "guidance": 3.0}, "guidance=3.0 and guidance_scale=2.0 of the call: leave one"),
    ({"genes": "joint"}, "knows no layers of LattePipeline that it could prune or reuse"),
    ({"genes": "levels", "calls": None}, "schedules of levels are searched for a model by name"),
    ({"model": "fashion-dit2"}, "a pipeline object was given, and model='fashion-dit2' beside it"),
    ({"call": [1]}, "call holds arguments of the pipeline's call by name, got list"),
    ({"call": {"prompt": []}}, "prompt of the call holds one condition or more, none empty, got []"),
    ({"call": {"prompt": ["a", " "]}}, "prompt of the call holds one condition or more, none empty"),
    ({"reference_steps": 0}, "reference_steps must be at least 1, got 0"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], message: str) -> None:
    given = {"call": VIDEO, "calls": 2, "progress": Counting(), **settings}
    with pytest.raises(DiffesError) as caught:
        diffes.search(quiet(latte), **given)
    assert message in str(caught.value)


def test_pipelines_that_a_plan_cannot_drive_are_refused() -> None:
    pipe = quiet(ddpm)
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(DiffesError, match="EDMEulerScheduler does not count in training timesteps"):
        diffes.search(pipe, calls=2, progress=Counting())
    stubborn = Stubborn(**quiet(ddpm).components)
    with pytest.raises(DiffesError, match="Stubborn returned before step 1 of its scheduler"):
        diffes.search(stubborn, calls=2, progress=Counting(), **SMALL)


def test_a_folder_or_a_pipeline_is_needed() -> None:
    with pytest.raises(DiffesError, match="give out, the folder of the run, or a pipeline object"):
        diffes.search(calls=2)
    with pytest.raises(DiffesError, match="with the name of a model, call is a JSON file"):
        diffes.search("runs/x", call={"height": 8})


def test_the_call_of_a_model_by_name(tmp_path: Path) -> None:
    """From `--call FILE`, or from the model's own folder."""
    pipe, _ = pipeline("sd3")
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "call.json").write_text('{"max_sequence_length": 4}')
    (tmp_path / "call.json").write_text('{"max_sequence_length": 4, "prompt": ["a fox", "a hen"]}')
    loaded = diffes.load_pipeline(str(tmp_path / "model"))
    adapter = adapter_for(loaded)
    assert adapter.call == {"max_sequence_length": 4} and len(adapter.choices("search")) == 64
    adapter.configure(None, str(tmp_path / "call.json"))
    assert adapter.choices("search") == ["a fox"]
    for text, said in (("[1]", "got list"), ("{", "no arguments of a call")):
        (tmp_path / "call.json").write_text(text)
        with pytest.raises(DiffesError, match=said):
            adapter.configure(None, str(tmp_path / "call.json"))


def test_samples_of_a_run_are_made_by_its_call(tmp_path: Path) -> None:
    pipe, _ = pipeline("sd3")
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "call.json").write_text(
        '{"max_sequence_length": 4, "prompt": ["a fox", "a hen"], "height": 8, "width": 8}'
    )
    options: dict[str, Any] = {"model": str(tmp_path / "model"), "call": str(tmp_path / "call.json"), **SMALL}
    diffes.search(tmp_path / "run", genes="steps", calls=2, guidance=2.0, progress=Counting(), **options)
    options = {"seed": 0, "steps": None, "guidance": None, "device": "cpu"}
    images, captions = sample_images(tmp_path / "run", None, **options)
    assert images.shape == (1, 3, 8, 8) and captions == ["a hen"]


def test_a_large_model_gets_fewer_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffes.study import functions

    monkeypatch.setattr(functions, "LARGE", 10)
    _, adapter, config = functions._of_pipeline(quiet(ddpm), "fashion-dit", None, 1, {"calls": 3, "heldout": 5})
    assert type(adapter) is ModelAdapter
    assert (config.probes, config.reference_steps, config.heldout, config.genes) == (8, 50, 5, "steps")


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_a_plan_for_a_strength_makes_all_its_calls(name: str) -> None:
    """diffusers drops the first calls by their number, rounded down by one family and up by the other."""
    kinds = {"sd15": StableDiffusionImg2ImgPipeline, "sd3": StableDiffusion3Img2ImgPipeline}
    base, call = pipeline(name)
    more = {"requires_safety_checker": False} if name == "sd15" else {}
    pipe: Any = kinds[name](**base.components, **more)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    size = {} if name == "sd15" else {"height": 16, "width": 16}
    call |= {"image": image, "strength": 0.6, **size}
    found = diffes.search(pipe, calls=3, call=call, guidance=2.0, genes="steps", progress=Counting(), **SMALL)
    assert found.record.strength == 0.6
    assert all(max(point.timesteps) < 600 for point in found.points)
    denoiser = base.unet if name == "sd15" else base.transformer
    one = call | {"prompt": "a fox", "guidance_scale": 2.0, "output_type": "latent"}
    diffes.apply(pipe, found)
    for n in (5, 10, 50):
        assert counted(denoiser, functools.partial(pipe, **one, num_inference_steps=n)) == 3
    with pytest.raises(DiffesError, match=r"made for strength 0.6.*Pass strength=0.6 and num_inference_steps=5"):
        pipe(**one | {"strength": 0.3})
    diffes.remove(pipe)
    with pytest.raises(DiffesError, match=r"drops the first \d+ steps, and the applied plan has 3.*strength=\.\.\."):
        diffes.apply(base, Plan(Stages.equal(1), ((999, 0), (500, 0), (200, 0)), 1, "ddim"))
        pipe.scheduler = base.scheduler
        pipe(**one)


def test_a_run_with_levels_is_applied_to_pipelines_around_the_same_denoiser(
    tiny_sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = make_run(tmp_path_factory, tiny_sdxl_folder, "obs")
    pipe = open_pipe(tiny_sdxl_folder)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "h a", "image": torch.rand(1, 3, 16, 16), "strength": 0.8, "num_inference_steps": 5}
    other = StableDiffusionXLImg2ImgPipeline(**pipe.components, add_watermarker=False)
    other.set_progress_bar_config(disable=True)

    def made() -> Any:
        return other(**call, generator=torch.Generator().manual_seed(0), output_type="np").images

    before = made()
    diffes.apply(other, run)
    assert (made() != before).any()
    diffes.remove(other)
    assert (made() == before).all()


def test_what_is_measured_is_what_the_pipeline_ends_with() -> None:
    """Inpainting pastes the original over what a mask leaves out, after the last step too."""
    base, call = pipeline("sd15")
    pipe: Any = StableDiffusionInpaintPipeline(**base.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    mask = torch.ones(1, 1, 16, 16)
    mask[..., :8] = 0
    call |= {"image": torch.rand(1, 3, 16, 16), "mask_image": mask, "strength": 1.0, "height": 16, "width": 16}
    adapter = adapter_for(pipe)
    adapter.use_call(call)
    probes = adapter.make_probes(1, 3)
    planned = PlanScheduler.of(pipe.scheduler, [900, 500, 200], "dpmsolver++")
    found = adapter.sample(probes, planned, 2.0)
    pipe.scheduler = planned
    generator = torch.Generator().manual_seed(probes.seeds[0])
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent", "generator": generator}
    own = pipe(**call | {"prompt": probes.conditions[0]} | options).images
    assert torch.equal(found, own)
