"""Comparisons and ablations: the cells, equal costs, and that nothing finished is run again."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Counting

from diffes import terminal
from diffes.config import ALONE, RunConfig, parse_variations
from diffes.errors import DiffesError
from diffes.measure.metrics import METRICS, latent_mse
from diffes.results.record import UNIFORM
from diffes.study import grid
from diffes.study.cells import CELLS
from diffes.study.equal_cost import TOLERANCE, at_budget, calls_of, same


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
        (["asynchronous=false,True"], {"asynchronous": [False, True]}),
    ],
)
def test_variations_are_read(texts: list[str], expected: dict[str, list[Any]]) -> None:
    assert parse_variations(texts) == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["stage=2,5"], "Did you mean 'stages'"),
        (["stages=two"], "stages must be a int, got 'two'"),
        (["dtype=int8"], "dtype must be one of float32, float16, bfloat16"),
        (["asynchronous=no"], "asynchronous must be one of true, false, got 'no'"),
        (["stages"], "varies nothing"),
        (["seed=1,2"], "unknown option to vary 'seed'"),
        ([], "nothing to vary"),
    ],
)
def test_bad_variations_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(DiffesError, match=message):
        parse_variations(texts)


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
    assert {calls_of(cell) for cell in grid.grid(base, varied, 2)} == {limit}
    for row in rows:
        searches = row.settings["strategy"] != "uniform"
        assert (row.denoiser_calls >= limit) == searches
        assert row.curve[-1][1] == pytest.approx(row.searched.search, rel=1e-5)
        assert searches or row.searched.heldout_mean == row.rivals[UNIFORM].heldout_mean


def test_results_are_written_for_people_and_machines(base: RunConfig, tmp_path: Path) -> None:
    varied: dict[str, list[Any]] = {"strategy": ["evolution", "random"], "budget": [0.25, 0.5]}
    grid.run_experiment(base, varied, 2, tmp_path, Counting())
    assert {"cells.jsonl", "results.csv", "results.json", "table.md", "convergence.png", "heldout.png"} <= {
        path.name for path in tmp_path.iterdir()
    }
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 8 and {line["strategy"] for line in lines} == {"evolution", "random"}
    assert {line["stages"] for line in lines} == {str(base.stages)}  # settings keep their names and values
    assert {line["heldout"] for line in lines} == {str(base.heldout)}
    assert all(len(json.loads(line["stage_ranges"])) == base.stages for line in lines)
    records = [json.loads(line)["searched"]["heldout_mean"] for line in (tmp_path / CELLS).read_text().splitlines()]
    assert sorted(float(line["heldout_mean"]) for line in lines) == sorted(records)
    data = json.loads((tmp_path / "results.json").read_text())
    assert [line["seeds"] for line in data["summary"]] == [2] * 4
    assert (tmp_path / "table.md").read_text().split("\n\n")[0].count("\n") == 5


def test_a_cell_cut_off_by_a_kill_runs_again(base: RunConfig, tmp_path: Path) -> None:
    cells = grid.grid(base, {"strategy": ["random"]}, 2)
    rows = grid.run_cells(cells, tmp_path, Counting())
    path = tmp_path / CELLS
    path.write_text(path.read_text()[:-20])
    again = Counting()
    found = grid.run_cells(cells, tmp_path, again)
    assert sum("searching" in title for title in again.titles) == 1
    assert [(r.found, r.searched, r.denoiser_calls) for r in found] == [
        (r.found, r.searched, r.denoiser_calls) for r in rows
    ]


def test_a_folder_of_something_else_is_refused(base: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years")
    with pytest.raises(DiffesError, match="holds no comparison"):
        grid.run_cells([base], tmp_path, Counting())
    with pytest.raises(DiffesError, match="is a file"):
        grid.run_cells([base], tmp_path / "thesis.txt", Counting())
    front = tmp_path / "front"  # it has journals, too
    (front / "journals").mkdir(parents=True)
    (front / "config.json").write_text("{}")
    with pytest.raises(DiffesError, match="holds no comparison"):
        grid.run_cells([base], front, Counting())


@pytest.mark.parametrize(
    ("content", "said"), [(b"\xff\n", "codec can't decode"), (b'{"a": 1}\n', "line 1 is no record")]
)
def test_damaged_cells_are_named_once(base: RunConfig, tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / CELLS).write_bytes(content)
    with pytest.raises(DiffesError, match=f"cells.jsonl is damaged .*{said}") as raised:
        grid.run_cells([base], tmp_path, Counting())
    assert str(raised.value).count("restore it") == 1


def test_all_cells_are_checked_before_the_first_one_runs(base: RunConfig, tmp_path: Path) -> None:
    for bad, message in (("tpee", "Did you mean"), ("evolution:moo=4", "moo"), ("evolution:mu=x", "mu")):
        with pytest.raises(DiffesError, match=message):
            grid.run_cells(grid.grid(base, {"strategy": ["random", bad]}, 1), tmp_path / "x", Counting())
        assert not (tmp_path / "x").exists()


def test_combinations_are_compared_at_the_same_cost(base: RunConfig, tmp_path: Path) -> None:
    """One stage can only express few costs: its values are interpolated to the budget, and so are those of others."""
    costly = replace(base, cost="macs", budget=0.8)
    first = Counting()
    comparison = grid.run_experiment(costly, {"stages": [1, 2]}, 2, tmp_path, first)
    one, two = comparison.summary()
    assert same([record.searched.macs_fraction for record in comparison.records]) is False
    assert one["cost"] == pytest.approx(0.8, rel=TOLERANCE) == two["cost"]
    assert two["same_cost"] and two["ahead"] is not None and two["difference_low"] is not None
    for record in comparison.records:
        above = record.above
        assert above is not None and above.settings["budget"] > 0.8 and above.found.stages == record.found.stages
        assert record.searched.macs_fraction < 0.8 <= above.searched.macs_fraction
        low, high = (each.searched.heldout_mean for each in (record, above))
        assert low is not None and high is not None
        assert min(low, high) <= (at_budget(record).searched.heldout_mean or 0) <= max(low, high)
    assert "interpolated" in comparison.markdown()
    again = Counting()
    assert grid.run_experiment(costly, {"stages": [1, 2]}, 2, tmp_path, again).records == comparison.records
    assert sum("searching" in title for title in first.titles) == 8 and again.titles == ["4 cells"]


def test_what_costs_the_same_is_not_searched_twice(base: RunConfig, tmp_path: Path) -> None:
    progress = Counting()
    comparison = grid.run_experiment(base, {"strategy": ["evolution", "uniform"]}, 1, tmp_path, progress)
    assert sum("searching" in title for title in progress.titles) == 2 and comparison.to_interpolate() == []


def test_a_cell_that_fails_does_not_stop_the_others_and_is_tried_again(
    base: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    varied: dict[str, list[Any]] = {"metric": ["broken", "latent_mse"]}
    healthy = [True]

    @METRICS.register("broken")
    def broken(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        if len(images) > 2 and not healthy[0]:
            raise RuntimeError("out\nof luck")
        return latent_mse(images, references)

    try:
        healthy[0] = False
        comparison = grid.run_experiment(base, varied, 1, tmp_path, Counting())
        assert [record.settings["metric"] for record in comparison.records] == ["latent_mse"]
        assert [each.settings["metric"] for each in comparison.failed] == ["broken"]
        text = (tmp_path / "table.md").read_text()
        assert (
            "| broken | failed |" in text
            and "Failed: metric broken, seed 0: PluginError: metric 'broken' failed (" in text
        )
        with pytest.raises(DiffesError, match=r"1 of 2 cells failed, the first with: .*\(RuntimeError: out of luck\)"):
            grid.run_cells(grid.grid(base, varied, 1), tmp_path, Counting())
        with pytest.raises(DiffesError, match="cells that failed: 1, named above"):
            terminal.experiment(base, varied, 1, tmp_path, ALONE)
        assert "(RuntimeError: out of luck)" in capsys.readouterr().out
        healthy[0] = True
        mended = Counting()
        assert grid.run_experiment(base, varied, 1, tmp_path, mended).failed == ()
        assert sum("searching" in title for title in mended.titles) == 1
    finally:
        METRICS.unregister("broken")


def test_cells_of_earlier_commands_stay_in_the_table(base: RunConfig, tmp_path: Path) -> None:
    grid.run_experiment(base, {"strategy": ["random", "uniform"]}, 1, tmp_path, Counting())
    comparison = grid.run_experiment(base, {"budget": [0.25]}, 1, tmp_path, Counting())
    assert comparison.varied == ("budget", "strategy")
    lines = [(line["budget"], line["strategy"]) for line in comparison.summary()]
    assert lines == [(0.25, "evolution"), (0.5, "random"), (0.5, "uniform")]
    assert all(line["ahead"] is None for line in comparison.summary()[:2])


def test_where_evaluations_cost_differently_all_may_spend_the_same(base: RunConfig) -> None:
    assert {calls_of(cell) for cell in grid.grid(base, {"probes": [2, 4]}, 1)} == {calls_of(base)}
    assert {calls_of(cell) for cell in grid.grid(base, {"max_evals": [2, 4]}, 1)} == {64, 128}


def test_the_calls_of_a_profile_are_counted(base: RunConfig, tmp_path: Path) -> None:
    (record,) = grid.run_cells([replace(base, strategy="mosaic")], tmp_path, Counting())
    profile = 4 * 24  # each stage on all calibration images
    assert record.denoiser_calls == profile + 4 * 4 * 2
    assert record.curve[0][0] == record.denoiser_calls


def test_a_seed_counts_once_and_other_resources_get_a_column(base: RunConfig, tmp_path: Path) -> None:
    varied = {"strategy": ["random"]}
    grid.run_experiment(replace(base, threads=1), varied, 2, tmp_path, Counting())
    again = grid.run_experiment(replace(base, threads=1, bank_memory=3.0), varied, 2, tmp_path, Counting())
    assert again.varied == ("strategy", "bank_memory")
    assert [(line["bank_memory"], line["seeds"]) for line in again.summary()] == [(3.0, 2), (4.0, 2)]


def test_cells_of_another_calibration_are_refused(base: RunConfig, tmp_path: Path) -> None:
    """Cells of one command share the calibration of its first seed."""
    found = grid.run_experiment(base, {"strategy": ["random"]}, 1, tmp_path, Counting())
    assert found.records[0].calibration_seed == base.seed == 0
    with pytest.raises(DiffesError, match=r"calibrated with seed 0, .* and here --seed is 1. Keep --seed and raise"):
        grid.run_experiment(replace(base, seed=1), {"strategy": ["random"]}, 1, tmp_path, Counting())


def test_settings_that_were_given_stay_where_what_is_searched_varies() -> None:
    given = RunConfig(metric="latent_cosine", strategy="random", calls=2.0)
    levels, steps = grid.grid(given, {"genes": ["levels", "steps"]}, 1)
    assert (levels.metric, levels.strategy, levels.calls) == ("latent_cosine", "random", None)
    assert (steps.metric, steps.strategy, steps.calls) == ("latent_cosine", "random", 2.0)
    assert [config.cost for config in (levels, steps)] == ["level", "macs"]


def test_a_range_of_guidance_and_old_names_of_values_may_vary() -> None:
    cells = grid.grid(RunConfig(), {"guidance": [2.0, (1.5, 4.0)], "allocation": ["damage", "equal"]}, 1)
    assert [(cell.guidance, cell.allocation) for cell in cells] == [
        (2.0, "sensitivity"), (2.0, "equal"), ((1.5, 4.0), "sensitivity"), ((1.5, 4.0), "equal"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("varied", "seeds", "message"),
    [
        ({}, 1, "nothing to vary"), ({"seed": [1, 2]}, 1, "unknown option to vary 'seed'"),
        ({"foo": [1]}, 1, "unknown option to vary 'foo'"), ({"calls": [2, 0.5]}, 1, "calls must be at least 1"),
        ({"calls": [2]}, 1.5, "seeds must be a whole number"), ({"dtype": ["float64"]}, 1, "dtype must be one of"),
    ],
)  # fmt: skip
def test_bad_grids_are_refused(varied: dict[str, list[Any]], seeds: Any, message: str) -> None:
    with pytest.raises(DiffesError, match=message):
        grid.grid(RunConfig(), varied, seeds)
