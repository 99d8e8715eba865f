"""Plans for pipeline objects, of classes that diffes has no adapter for."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Counting
from diffusers import DDPMPipeline, EDMEulerScheduler
from families import ddpm, ltx, pipeline

import diffes
from diffes.adapters import ModelAdapter, adapter_for
from diffes.errors import DiffesError, DiffesWarning
from diffes.study.functions import Front

VIDEO = {"prompt": ["a fox", "a hen"], "height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 8}
SMALL: dict[str, Any] = {"max_evals": 4, "probes": 2, "heldout": 2, "fit_probes": 2, "reference_steps": 12}


def quiet(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def counted(module: torch.nn.Module, call: Callable[[], object]) -> int:
    """How often a module is called."""
    calls: list[object] = []
    handle = module.register_forward_hook(lambda *_: calls.append(None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DiffesWarning)
        call()
    handle.remove()
    return len(calls)


def test_a_video_pipeline_runs_a_fitted_plan() -> None:
    pipe, progress = quiet(ltx), Counting()
    found = diffes.search(pipe, calls=3, call=VIDEO, progress=progress, **SMALL)
    assert any("denoiser calls on one image each" in title for title in progress.titles)
    assert {point.kind for point in found.points} == {"dense", "off-the-shelf", "dense-planned", "dense-fitted"}
    assert all(point.latent_mse is not None and point.image_mse is None for point in found.points)
    assert found.record.guidance == 3.0  # that of the pipeline's own default
    diffes.apply(pipe, found)
    call = VIDEO | {"prompt": "a fox", "output_type": "latent"}
    assert counted(pipe.transformer, lambda: pipe(**call)) == 3
    with pytest.warns(DiffesWarning, match=r"made for latents of shape \(192, 8\), and this call has \(384, 8\)"):
        pipe(**call | {"height": 64})
    diffes.remove(pipe)
    assert counted(pipe.transformer, lambda: pipe(**call, num_inference_steps=2)) == 2


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
    adapter = adapter_for(quiet(ltx))
    adapter.use_call(VIDEO | {"prompt": ["a", "b", "c", "d", "e"]})
    assert adapter.choices("search") == ["a", "c", "e"] and adapter.choices("heldout") == ["b", "d"]
    adapter.use_call(VIDEO | {"prompt": "alone"})
    assert adapter.choices("search") == adapter.choices("heldout") == ["alone"]


class Stubborn(DDPMPipeline):  # type: ignore[misc]
    """Makes no steps of its scheduler."""

    def __call__(self, generator: Any = None, num_inference_steps: int = 5) -> Any:
        return self.unet(torch.zeros(1, 3, 16, 16), 5)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"call": {"heigth": 8}}, "LTXPipeline takes no argument 'heigth'; it takes prompt"),
    ({"call": {"num_inference_steps": 8}}, "leave num_inference_steps out of the call: a plan says how many"),
    ({"call": {"latents": None}}, "leave latents out of the call: every probe has noise of its own"),
    ({"workers": 2}, "workers=2 load the model by its name, and a pipeline object was given"),
    ({"call": {"guidance_scale": 2.0}, "guidance": 3.0}, "guidance=3.0 and guidance_scale=2.0 of the call: leave one"),
    ({"genes": "joint"}, "knows no layers of LTXPipeline that it could prune or reuse"),
    ({"genes": "levels", "calls": None}, "schedules of levels are searched for a model by name"),
    ({"model": "fashion-dit2"}, "a pipeline object was given, and model='fashion-dit2' beside it"),
    ({"reference_steps": 0}, "reference_steps must be at least 1, got 0"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], message: str) -> None:
    given = {"call": VIDEO, "calls": 2, "progress": Counting(), **settings}
    with pytest.raises(DiffesError) as caught:
        diffes.search(quiet(ltx), **given)
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


def test_a_large_model_gets_fewer_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffes.study import functions

    monkeypatch.setattr(functions, "LARGE", 10)
    _, adapter, config = functions._of_pipeline(quiet(ddpm), "fashion-dit", None, 1, {"calls": 3, "heldout": 5})
    assert type(adapter) is ModelAdapter
    assert (config.probes, config.reference_steps, config.heldout, config.genes) == (8, 50, 5, "steps")
