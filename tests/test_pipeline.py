"""apply and remove: a run inside diffusers, and out of it again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, DPMSolverMultistepScheduler

import diffes
from diffes import folder
from diffes.cli import main
from diffes.errors import DiffesError


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    main([
        "search", "--model", str(tiny_folder), "--stages", "4", "--steps", "8", "--max-evals", "6", "--probes", "4",
        "--heldout", "4", "--metric", "latent_mse", "--out", str(out),
    ])  # fmt: skip
    return out


def images(pipe: DiTPipeline, steps: int = 8, guidance: float = 2.0) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe([0, 3], guidance, torch.Generator().manual_seed(5), steps, output_type="np").images


def test_apply_then_remove_restores_every_bit(run: Path, tiny_folder: Path) -> None:
    pipe = DiTPipeline.from_pretrained(tiny_folder)
    before, weights = images(pipe), {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    assert diffes.apply(pipe, run) is pipe
    pruned = images(pipe)
    assert not np.array_equal(pruned, before)
    diffes.apply(pipe, run)
    np.testing.assert_array_equal(images(pipe), pruned)
    diffes.remove(pipe)
    np.testing.assert_array_equal(images(pipe), before)
    assert all(torch.equal(v, weights[k]) for k, v in pipe.transformer.state_dict().items())
    with pytest.raises(DiffesError, match="no run is applied"):
        diffes.remove(pipe)


def test_applied_pipelines_take_other_samplers_steps_and_guidance(run: Path, tiny_folder: Path) -> None:
    pipe = DiTPipeline.from_pretrained(tiny_folder)
    diffes.apply(pipe, run)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    for steps in (5, 25):
        for guidance in (1.0, 3.0):
            assert np.isfinite(images(pipe, steps, guidance)).all()


def test_half_precision(run: Path, tiny_folder: Path) -> None:
    pipe = DiTPipeline.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    diffes.apply(pipe, run)
    assert np.isfinite(images(pipe)).all()


def altered(run: Path, tmp_path: Path, name: str, change) -> Path:  # type: ignore[no-untyped-def]
    copy = tmp_path / "altered"
    shutil.copytree(run, copy)
    change(copy / name)
    return copy


def edit_levels(path: Path) -> None:
    data = json.loads(path.read_text())
    data["levels"] = data["levels"][::-1]
    path.write_text(json.dumps(data))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (folder.SCHEDULE, edit_levels, "was altered"),
        (folder.SCHEDULE, truncate, "is damaged"),
        (folder.SCHEDULE, Path.unlink, "unfinished"),
        (folder.BANK, flip_a_byte, "truncated or altered"),
        (folder.BANK, truncate, "truncated or altered"),
        (folder.BANK, Path.unlink, "is missing"),
    ],
)
def test_damaged_runs_are_refused_and_leave_the_pipeline_alone(
    run: Path, tiny_folder: Path, tmp_path: Path, name: str, change, message: str
) -> None:  # type: ignore[no-untyped-def]
    damaged = altered(run, tmp_path, name, change)
    pipe = DiTPipeline.from_pretrained(tiny_folder)
    before = images(pipe)
    with pytest.raises(DiffesError, match=message):
        diffes.apply(pipe, damaged)
    np.testing.assert_array_equal(images(pipe), before)


def test_a_run_of_another_model_is_refused(run: Path) -> None:
    pipe = diffes.load_pipeline("fashion-dit")
    with pytest.raises(DiffesError, match="another model"):
        diffes.apply(pipe, run)
    assert not pipe.transformer._forward_pre_hooks


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    pipe = DiTPipeline.from_pretrained(tiny_folder)
    with pytest.raises(DiffesError, match="no run folder"):
        diffes.apply(pipe, tmp_path)
    with pytest.raises(DiffesError, match="no folder"):
        diffes.apply(pipe, tmp_path / "nothing")
