"""Comparisons and ablations: the cells, equal costs, and that nothing finished is run again."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Counting

from diffes.errors import DiffesError
from diffes.study import grid
from diffes.study.config import RunConfig


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["stages=2,5", "metric=ssim"], {"stages": [2, 5], "metric": ["ssim"]}),
        (
            ["method=obs:damping=0.1,weighting=log", "method=wanda"],
            {"method": ["obs:damping=0.1,weighting=log", "wanda"]},
        ),
        (["--max-calls=100,200", "budget=0.3"], {"max_calls": [100, 200], "budget": [0.3]}),
        (["cost=macs,level"], {"cost": ["macs", "level"]}),
    ],
)
def test_variations_are_read(texts: list[str], expected: dict[str, list[Any]]) -> None:
    assert grid.parse_variations(texts) == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["stage=2,5"], "Did you mean 'stages'"),
        (["stages=two"], "stages must be a int, got 'two'"),
        (["dtype=int8"], "dtype must be one of float32, float16, bfloat16"),
        (["stages"], "varies nothing"),
        (["seed=1,2"], "unknown option to vary 'seed'"),
        ([], "nothing to vary"),
    ],
)
def test_bad_variations_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(DiffesError, match=message):
        grid.parse_variations(texts)


def test_cells_of_one_calibrated_model_follow_each_other(base: RunConfig) -> None:
    cells = grid.grid(base, {"budget": [0.3, 0.5], "stages": [2, 4]}, 2)
    assert [(c.stages, c.budget, c.seed) for c in cells] == [
        (stages, budget, seed) for stages in (2, 4) for budget in (0.3, 0.5) for seed in (0, 1)
    ]
    with pytest.raises(DiffesError, match="stages must be at least 1"):
        grid.grid(base, {"stages": [0]}, 1)
    with pytest.raises(DiffesError, match="seeds must be at least 1"):
        grid.grid(base, {}, 0)


def test_cells_run_once_and_spend_alike(base: RunConfig, tmp_path: Path) -> None:
    varied = {"strategy": ["evolution", "random", "uniform"]}
    first = Counting()
    some = grid.run_cells(grid.grid(base, varied, 1), tmp_path, first)
    assert sum("calibrating" in title for title in first.titles) == 1
    more = Counting()
    rows = grid.run_cells(grid.grid(base, varied, 2), tmp_path, more)
    assert sum("searching" in title for title in more.titles) == 3
    assert [row for row in rows if row.settings["seed"] == 0] == some
    again = Counting()
    assert grid.run_cells(grid.grid(base, varied, 2), tmp_path, again) == rows
    assert again.titles == ["6 cells"]
    limit = 6 * 4 * 4 * 2
    assert {grid.calls_of(cell) for cell in grid.grid(base, varied, 2)} == {limit}
    for row in rows:
        searches = row.settings["strategy"] != "uniform"
        assert (row.denoiser_calls >= limit) == searches
        assert row.curve[-1][1] == pytest.approx(row.searched.search, rel=1e-5)
        assert searches or row.searched.heldout_mean == row.uniform.heldout_mean


def test_results_are_written_for_people_and_machines(base: RunConfig, tmp_path: Path) -> None:
    varied: dict[str, list[Any]] = {"strategy": ["evolution", "random"], "budget": [0.25, 0.5]}
    grid.run_experiment(base, varied, 2, tmp_path, Counting())
    assert {"cells.jsonl", "results.csv", "results.json", "table.md", "convergence.png", "heldout.png"} <= {
        path.name for path in tmp_path.iterdir()
    }
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 8 and {line["strategy"] for line in lines} == {"evolution", "random"}
    data = json.loads((tmp_path / "results.json").read_text())
    assert [line["seeds"] for line in data["summary"]] == [2] * 4
    assert (tmp_path / "table.md").read_text().count("\n") == 6


def test_a_cell_cut_off_by_a_kill_runs_again(base: RunConfig, tmp_path: Path) -> None:
    cells = grid.grid(base, {"strategy": ["random"]}, 2)
    rows = grid.run_cells(cells, tmp_path, Counting())
    path = tmp_path / grid.CELLS
    path.write_text(path.read_text()[:-20])
    again = Counting()
    found = grid.run_cells(cells, tmp_path, again)
    assert sum("searching" in title for title in again.titles) == 1
    assert [(r.schedule, r.searched, r.denoiser_calls) for r in found] == [
        (r.schedule, r.searched, r.denoiser_calls) for r in rows
    ]


def test_a_folder_of_something_else_is_refused(base: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years")
    with pytest.raises(DiffesError, match="holds no comparison"):
        grid.run_cells([base], tmp_path, Counting())
    with pytest.raises(DiffesError, match="is a file"):
        grid.run_cells([base], tmp_path / "thesis.txt", Counting())


def test_all_cells_are_checked_before_the_first_one_runs(base: RunConfig, tmp_path: Path) -> None:
    for bad, message in (("tpee", "Did you mean"), ("evolution:moo=4", "moo"), ("evolution:mu=x", "mu")):
        with pytest.raises(DiffesError, match=message):
            grid.run_cells(grid.grid(base, {"strategy": ["random", bad]}, 1), tmp_path / "x", Counting())
        assert not (tmp_path / "x").exists()
