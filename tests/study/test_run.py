"""A whole run: what its folder holds agrees with its report, and its pictures are of held-out probes."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Counting, small_config
from matplotlib.figure import Figure

from diffes.adapters.text_to_image import TextToImageAdapter
from diffes.config import HELDOUT_SEED, RunConfig
from diffes.errors import DiffesError
from diffes.figures import plots
from diffes.problems.workbench import Workbench
from diffes.results import folder
from diffes.results.record import FEWER_STEPS, UNIFORM
from diffes.results.report import COLUMNS, read_report, rows
from diffes.spaces.ledger import LOGGED
from diffes.study import run as runs


@pytest.mark.slow
def test_the_pictures_and_the_report_are_of_heldout_prompts(
    prompted: Workbench, tiny_sdxl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[dict[str, torch.Tensor], Sequence[str]]] = []
    image_grid = plots.image_grid

    def noted(shown: dict[str, torch.Tensor], columns: Sequence[str], differences: bool) -> Figure:
        drawn.append((shown, columns))
        return image_grid(shown, columns, differences)

    monkeypatch.setattr(plots, "image_grid", noted)
    report = runs.complete_run(small_config(tiny_sdxl_folder, heldout=6), tmp_path / "run", Counting())
    ((shown, captions),) = drawn
    adapter = prompted.adapter
    assert isinstance(adapter, TextToImageAdapter)
    assert len(captions) == runs.IMAGES and set(captions) == set(adapter.prompts["heldout"])
    evaluator = prompted.evaluator(runs.IMAGES, HELDOUT_SEED, "heldout")
    torch.testing.assert_close(shown["dense, 4 steps"], adapter.decode(evaluator.dense_latents(4)))
    found = report.run.found
    torch.testing.assert_close(shown["searched"], adapter.decode(evaluator.latents(found)), rtol=1e-3, atol=1e-3)
    scores = prompted.evaluator(6, HELDOUT_SEED, "heldout").scores(found)
    assert report.run.searched.heldout_mean == pytest.approx(float(scores.mean()), rel=1e-3)


def test_the_logbook_has_a_line_a_generation_and_ends_as_the_report(run: Path) -> None:
    with (run / folder.LOGBOOK).open(newline="") as file:
        reader = csv.DictReader(file)
        lines = list(reader)
    assert tuple(reader.fieldnames or ()) == LOGGED
    assert LOGGED == ("generation", "evaluations", "denoiser_calls", "best", "mean", "spread", "diversity")
    report = read_report(run).run
    assert [int(line["generation"]) for line in lines] == list(range(len(lines)))
    assert int(lines[-1]["evaluations"]) == report.evaluations == 6
    assert int(lines[-1]["denoiser_calls"]) == report.denoiser_calls
    assert float(lines[-1]["best"]) == pytest.approx(report.searched.search)


@pytest.mark.slow
def test_the_report_is_read_back_as_it_was_written(any_run: Path) -> None:
    report = read_report(any_run)
    assert report.to_json() == json.loads((any_run / folder.REPORT).read_text())
    table = rows(report)
    assert {len(row) for row in table} == {len(COLUMNS)}
    assert [row[0] for row in table[:3]] == ["dense", "uniform", "searched"]
    assert table[3][0] == f"dense, {report.run.rivals[FEWER_STEPS].steps} of 4 steps"
    assert table[2][1] == f"{report.run.searched.heldout_mean:.4f}"


def test_the_rivals_search_score_is_on_the_searchs_probes(bench: Workbench, tiny_folder: Path, tmp_path: Path) -> None:
    report = runs.complete_run(small_config(tiny_folder), tmp_path / "run", Counting())
    expected = bench.evaluator(4, bench.config.seed).scores(bench.uniform()).mean()
    assert report.run.rivals[UNIFORM].search == pytest.approx(float(expected), rel=1e-3)
    assert report.run.rivals[UNIFORM].search != report.run.rivals[UNIFORM].heldout_mean


@pytest.mark.slow
def test_folders_search_a_study_together(base: RunConfig, tmp_path: Path) -> None:
    together = replace(base, storage=f"sqlite:///{tmp_path / 'studies.db'}", study="all", asynchronous=True)
    first = runs.complete_run(together, tmp_path / "one", Counting())
    more = replace(together, max_evals=10, strategy="surrogate:initial=4")
    second = runs.complete_run(more, tmp_path / "two", Counting())
    assert (first.run.evaluations, second.run.evaluations) == (6, 10)
    assert second.run.searched.search >= first.run.searched.search  # type: ignore[operator]
    with pytest.raises(DiffesError, match=r"study 'all' in .* was begun with other settings"):
        runs.complete_run(replace(together, probes=3), tmp_path / "three", Counting())
    for wrong in ({"storage": None}, {"asynchronous": False}, {"study": ""}):
        with pytest.raises(DiffesError, match="it needs a name, a storage that all of them reach, and asynchronous"):
            replace(together, **wrong)  # type: ignore[arg-type]
    with pytest.raises(DiffesError, match="latency differs by process: set cost to macs"):
        runs.complete_run(replace(together, cost="latency"), tmp_path / "three", Counting())
    with pytest.raises(DiffesError, match="would leave what others measured in --study all"):
        runs.complete_run(together, tmp_path / "one", Counting(), overwrite=True)
