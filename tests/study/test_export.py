"""A finished run as a folder of its own: what is in it, where it opens, what it never writes over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import altered, images, make_run
from diffusers import DiffusionPipeline

import diffes
from diffes.cli import main
from diffes.errors import DiffesError
from diffes.results import artifact, folder
from diffes.results.report import read_report
from diffes.study.export import CARD, export

SAMPLE = """
import sys, numpy, torch, diffes
for name in sys.argv[1:]:
    pipe = diffes.load(name)
    pipe.set_progress_bar_config(disable=True)
    conditions = [0, 3] if hasattr(pipe, "transformer") else ["h a", "h c"]
    options = dict(generator=torch.Generator().manual_seed(5), num_inference_steps=5, output_type="np")
    numpy.save(name + ".npy", pipe(conditions, guidance_scale=2.0, **options).images)
"""


@pytest.mark.slow
def test_exported_and_loaded_in_another_process_gives_the_same_bits(
    tiny_folder: Path, tiny_sdxl_folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = {}
    for model in (tiny_folder, tiny_sdxl_folder):
        for method in ("obs", "layer_drop"):
            run = make_run(tmp_path_factory, model, method)
            name = f"{model.name}-{method}"
            expected[name] = images(diffes.apply(DiffusionPipeline.from_pretrained(model), run))
            np.testing.assert_array_equal(images(diffes.load(run)), expected[name])
            main(["export", str(run), str(tmp_path / "mine" / name)])
            out = (tmp_path / "mine" / name).rename(tmp_path / name)
            card = (out / CARD).read_text()
            assert f"{read_report(run).run.searched.heldout_mean:.4f}" in card
            for path in (CARD, artifact.SCHEDULE, artifact.BANK):
                assert str(model).encode() not in (out / path).read_bytes()
    subprocess.run([sys.executable, "-c", SAMPLE, *expected], check=True, cwd=tmp_path, env=os.environ)
    for name, pixels in expected.items():
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), pixels)


@pytest.mark.slow
def test_a_shipped_model_is_exported_by_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    main([
        "search", "--genes", "levels", "--stages", "2", "--steps", "4", "--max-evals", "2", "--probes", "2",
        "--heldout", "2", "--metric", "latent_mse", "--calibration-samples", "16", "--out", str(run),
    ])  # fmt: skip
    export(run, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out" / artifact.BASE).exists()
    assert json.loads((tmp_path / "out" / artifact.SCHEDULE).read_text())["model"] == "fashion-dit"
    full, half = ((at / artifact.BANK).stat().st_size for at in (run, tmp_path / "out"))
    assert half < 0.6 * full
    assert np.isfinite(images(diffes.load(tmp_path / "out"), 4)).all()


def test_export_overwrites_nothing_but_exports(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("ten years")
    for overwrite in (False, True):
        with pytest.raises(DiffesError, match="name another folder"):
            export(run, out, overwrite=overwrite)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.txt"]
    export(run, tmp_path / "good")
    before = (tmp_path / "good" / artifact.BANK).read_bytes()
    with pytest.raises(DiffesError, match="--overwrite"):
        export(run, tmp_path / "good")
    export(run, tmp_path / "good", dtype="float16", overwrite=True)
    assert (tmp_path / "good" / artifact.BANK).read_bytes() != before
    with pytest.raises(DiffesError, match="cannot write"):
        export(run, Path("/proc/nowhere"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "out"]


def test_an_unfinished_run_is_not_exported(run: Path, tmp_path: Path) -> None:
    unfinished = altered(run, tmp_path, folder.REPORT, Path.unlink)
    with pytest.raises(DiffesError, match="unfinished"):
        export(unfinished, tmp_path / "out")
    assert not (tmp_path / "out").exists()
