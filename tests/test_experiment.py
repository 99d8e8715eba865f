"""Comparisons and ablations: the cells, equal costs, statistics, and that nothing finished is run again."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffes import experiment
from diffes.bench import prepare
from diffes.comparison import Comparison
from diffes.config import RunConfig
from diffes.errors import DiffesError


class Counting:
    """Progress that notes the titles of its tasks."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        self.titles.append(title)
        yield lambda note, amount=1: None


@pytest.fixture
def base(tiny_folder: Path) -> RunConfig:
    return RunConfig(
        model=str(tiny_folder), method="magnitude", stages=4, steps=4, metric="latent_mse", probes=4, heldout=4,
        max_evals=6,
    )  # fmt: skip


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
    assert experiment.parse_variations(texts) == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["stage=2,5"], "Did you mean 'stages'"),
        (["stages=two"], "stages must be a int, got 'two'"),
        (["cost=watts"], "cost must be one of level, macs, latency"),
        (["stages"], "varies nothing"),
        (["seed=1,2"], "unknown option to vary 'seed'"),
        ([], "nothing to vary"),
    ],
)
def test_bad_variations_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(DiffesError, match=message):
        experiment.parse_variations(texts)


def test_cells_of_one_calibrated_model_follow_each_other(base: RunConfig) -> None:
    cells = experiment.grid(base, {"budget": [0.3, 0.5], "stages": [2, 4]}, 2)
    assert [(c.stages, c.budget, c.seed) for c in cells] == [
        (stages, budget, seed) for stages in (2, 4) for budget in (0.3, 0.5) for seed in (0, 1)
    ]
    with pytest.raises(DiffesError, match="stages must be at least 1"):
        experiment.grid(base, {"stages": [0]}, 1)
    with pytest.raises(DiffesError, match="seeds must be at least 1"):
        experiment.grid(base, {}, 0)


def test_cells_run_once_and_spend_alike(base: RunConfig, tmp_path: Path) -> None:
    varied = {"strategy": ["evolution", "random", "uniform"]}
    first = Counting()
    some = experiment.run_cells(experiment.grid(base, varied, 1), tmp_path, first)
    assert sum("calibrating" in title for title in first.titles) == 1
    more = Counting()
    rows = experiment.run_cells(experiment.grid(base, varied, 2), tmp_path, more)
    assert sum("searching" in title for title in more.titles) == 3
    assert [row for row in rows if row["settings"]["seed"] == 0] == some
    again = Counting()
    assert experiment.run_cells(experiment.grid(base, varied, 2), tmp_path, again) == rows
    assert again.titles == ["6 cells"]
    limit = 6 * 4 * 4 * 2
    assert {experiment.calls_of(cell) for cell in experiment.grid(base, varied, 2)} == {limit}
    for row in rows:
        searches = row["settings"]["strategy"] != "uniform"
        assert (row["denoiser_calls"] >= limit) == searches
        assert row["curve"][-1][1] == pytest.approx(row["search"], rel=1e-5)
        if not searches:
            assert row["heldout"] == row["uniform_heldout"]


def test_results_are_written_for_people_and_machines(base: RunConfig, tmp_path: Path) -> None:
    varied = {"strategy": ["evolution", "random"], "budget": [0.25, 0.5]}
    experiment.run_experiment(base, varied, 2, tmp_path, Counting())
    assert {"cells.jsonl", "results.csv", "results.json", "table.md", "convergence.png", "heldout.png"} <= {
        path.name for path in tmp_path.iterdir()
    }
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 8 and {line["strategy"] for line in lines} == {"evolution", "random"}
    data = json.loads((tmp_path / "results.json").read_text())
    assert [line["seeds"] for line in data["summary"]] == [2] * 4
    assert (tmp_path / "table.md").read_text().count("\n") == 6


def row(strategy: str, seed: int, heldout: float) -> dict[str, Any]:
    settings = replace(RunConfig(), strategy=strategy, seed=seed).to_json()
    other = dict.fromkeys(
        ("search", "uniform_heldout", "fewer_steps_heldout", "macs", "denoiser_calls", "evaluations"), 1.0
    )
    return {"settings": settings, "heldout": heldout, **other}


def test_the_test_is_paired_by_seed() -> None:
    """Six seeds, always ahead by a little, between seeds that differ by much: p is the smallest possible, 2 / 2^6."""
    rows = [row("evolution", seed, seed * 10.0) for seed in range(6)]
    rows += [row("tpe", seed, seed * 10.0 + 0.1 + seed / 100) for seed in reversed(range(6))]
    first, second = Comparison(("strategy",), tuple(rows)).summary()
    assert first["p"] is None and first["ahead"] is None
    assert second["p"] == pytest.approx(2 / 2**6) and second["ahead"] == 6


def test_a_cell_cut_off_by_a_kill_runs_again(base: RunConfig, tmp_path: Path) -> None:
    cells = experiment.grid(base, {"strategy": ["random"]}, 2)
    rows = experiment.run_cells(cells, tmp_path, Counting())
    path = tmp_path / experiment.CELLS
    path.write_text(path.read_text()[:-20])
    again = Counting()
    found = experiment.run_cells(cells, tmp_path, again)
    assert sum("searching" in title for title in again.titles) == 1
    assert [(r["levels"], r["heldout"], r["denoiser_calls"]) for r in found] == [
        (r["levels"], r["heldout"], r["denoiser_calls"]) for r in rows
    ]


def test_a_folder_of_something_else_is_refused(base: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years")
    with pytest.raises(DiffesError, match="holds no comparison"):
        experiment.run_cells([base], tmp_path, Counting())
    with pytest.raises(DiffesError, match="is a file"):
        experiment.run_cells([base], tmp_path / "thesis.txt", Counting())


def test_budgets_in_macs_and_latency(base: RunConfig) -> None:
    """What is found costs at most the budget, counted over the whole network."""
    from diffes.cost import macs_fraction

    bench = prepare(replace(base, cost="macs", budget=0.7), Counting())
    space = bench.space
    levels = space.uniform()
    assert 0.6 < macs_fraction(bench.router, space.schedule(levels), space.steps) <= 0.7001
    with pytest.raises(DiffesError, match=r"fraction of the dense cost in \[0\.\d+, 1\], got 0.01"):
        prepare(replace(base, cost="macs", budget=0.01), Counting())
    timed = prepare(replace(base, cost="latency", budget=1.0), Counting())
    assert timed.costs is not None and all(len(row) == 5 and min(row) > 0 for row in timed.costs)
    assert prepare(replace(base, cost="latency", budget=1.0), Counting(), timed.costs).space == timed.space


def test_only_what_was_measured_alike_is_compared_and_failures_are_left_out() -> None:
    rows = [row("evolution", seed, 1.0 + seed) for seed in range(3)]
    rows += [row("tpe", 0, 2.0), row("tpe", 1, 0.5) | {"heldout": None}, row("tpe", 2, 0.0)]
    other = [row("random", seed, -5.0) for seed in range(3)]
    for each in other:
        each["settings"]["metric"] = "latent_mse"
    comparison = Comparison(("strategy", "metric"), tuple([*rows, *other]))
    first, second, third = comparison.summary()
    assert (second["failed"], second["ahead"], second["heldout_mean"]) == (1, 1, 1.0)
    assert third["ahead"] is None and third["p"] is None and first["failed"] == 0
    assert "failed" in Comparison(("strategy",), (row("evolution", 0, 1.0) | {"heldout": None},)).markdown()


def test_all_cells_are_checked_before_the_first_one_runs(base: RunConfig, tmp_path: Path) -> None:
    for bad, message in (("tpee", "Did you mean"), ("evolution:moo=4", "moo"), ("evolution:mu=x", "mu")):
        with pytest.raises(DiffesError, match=message):
            experiment.run_cells(experiment.grid(base, {"strategy": ["random", bad]}, 1), tmp_path / "x", Counting())
        assert not (tmp_path / "x").exists()
