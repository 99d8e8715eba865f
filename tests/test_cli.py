"""The command line end to end, and every kind of bad input."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from PIL import Image

from diffes import files
from diffes.cli import main
from diffes.results import artifact, folder
from diffes.results.record import UNIFORM, Report, RunRecord
from diffes.results.report import read_report

SMALL = ["--stages", "4", "--steps", "8", "--max-evals", "8", "--probes", "4", "--heldout", "4"]
SMALL += ["--metric", "latent_mse"]


def search(out: Path, *options: str) -> None:
    main(["search", "--genes", "levels", *SMALL, "--out", str(out), *options])


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Runs a command that must fail with status 2 and one paragraph; returns the message."""
    with pytest.raises(SystemExit) as stopped:
        main(list(args))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.strip()
    return " ".join(error.replace("│", " ").split())


@pytest.mark.slow
def test_shipped_model_search_and_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    search(run, "--metric", "ssim", "--max-evals", "20")
    assert "searched" in capsys.readouterr().out
    assert sorted(path.name for path in run.iterdir()) == sorted(folder.FILES)
    report = read_report(run)
    schedule = json.loads((run / artifact.SCHEDULE).read_text())
    assert schedule["stages"] == [[0, 250], [250, 500], [500, 750], [750, 1000]]
    assert sum(schedule["levels"]) == 0.5 * 8 * 4 and schedule["max_level"] == 8
    assert (schedule["method"], schedule["kind"], schedule["model"]) == ("obs", "width", "fashion-dit")
    found, rivals = report.run.searched, report.run.rivals
    assert list(report.run.found.levels) == schedule["levels"] and found.nominal_sparsity == 0.5
    assert 0.5 < found.macs_fraction == schedule["macs_fraction"] < 0.6
    assert report.run.evaluations == 20 and 0 < report.run.denoiser_calls <= 20 * 8 * 4 * 2
    assert (found.search or 0) >= (rivals[UNIFORM].search or 1) and report.timing.speedup(found) > 0
    assert report.bank_bytes == (run / artifact.BANK).stat().st_size
    assert 0 < report.prunable_fraction < 1
    for name in folder.FIGURES:
        with Image.open(run / name) as image:
            assert min(image.size) > 200 and len(set(image.convert("L").tobytes())) > 10
    grid = tmp_path / "grid.png"
    main(["sample", str(run), "--classes", "0", "3", "5", "--seed", "1", "--out", str(grid)])
    with Image.open(grid) as image:
        assert image.width > image.height
    assert "exists" in fails(capsys, "sample", str(run), "--out", str(grid))
    assert "existing folder" in fails(capsys, "sample", str(run), "--out", str(tmp_path / "no" / "x.png"))
    assert "[1, 1000], got 5000" in fails(
        capsys, "sample", str(run), "--steps", "5000", "--out", str(tmp_path / "x.png")
    )
    assert "[0, 9]" in fails(capsys, "sample", str(run), "--classes", "10", "--out", str(tmp_path / "x.png"))


def test_sample_makes_pictures_and_refuses_what_it_cannot_make(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, new = tmp_path / "grid.png", str(tmp_path / "x.png")
    main(["sample", str(run), "--classes", "0", "3", "5", "--seed", "1", "--out", str(grid)])
    with Image.open(grid) as image:
        assert image.format == "PNG" and image.width > image.height
    assert "exists" in fails(capsys, "sample", str(run), "--out", str(grid))
    assert "existing folder" in fails(capsys, "sample", str(run), "--out", str(tmp_path / "no" / "x.png"))
    assert "[1, 1000], got 5000" in fails(capsys, "sample", str(run), "--steps", "5000", "--out", new)
    assert "[0, 5]" in fails(capsys, "sample", str(run), "--classes", "6", "--out", new)
    assert "a seed in [0, 2^32)" in fails(capsys, "sample", str(run), "--seed", "-1", "--out", new)
    assert not Path(new).exists()


@pytest.mark.slow
def test_a_text_to_image_model_takes_prompts(
    tiny_folder: Path, tiny_sdxl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, grid = tmp_path / "run", tmp_path / "grid.png"
    prompts = tmp_path / "mine.json"
    prompts.write_text(json.dumps({"search": ["a b", "c"], "heldout": ["d e"], "calibration": ["f"]}))
    search(run, "--model", str(tiny_sdxl_folder), "--method", "layer_drop:importance=mse", "--prompts", str(prompts))
    facts = json.loads((run / artifact.SCHEDULE).read_text())
    assert (facts["method"], facts["kind"], facts["max_level"]) == ("layer_drop:importance=mse", "depth", 7)
    main(["sample", str(run), "--prompts", "a cat", "a dog", "--out", str(grid)])
    main(["sample", str(run), "--out", str(grid), "--overwrite"])
    nothing = ["--out", str(tmp_path / "x.png")]
    assert "takes prompts" in fails(capsys, "sample", str(run), "--classes", "1", *nothing)
    assert "not both" in fails(capsys, "sample", str(run), "--classes", "1", "--prompts", "x", *nothing)
    assert "at least one condition" in fails(capsys, "sample", str(run), "--prompts", *nothing)
    of_classes = ["search", "--genes", "levels", *SMALL, "--model", str(tiny_folder), "--out", str(tmp_path / "no")]
    assert "takes class ids" in fails(capsys, *of_classes, "--prompts", str(prompts))
    prompts.write_text("{}")
    of_prompts = [
        "search",
        "--genes",
        "levels",
        *SMALL,
        "--model",
        str(tiny_sdxl_folder),
        "--out",
        str(tmp_path / "no"),
    ]
    assert "at least one prompt" in fails(capsys, *of_prompts, "--prompts", str(prompts))
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_ablate_varies_what_it_is_told_to(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    small = ["--model", str(tiny_folder), *SMALL, "--method", "magnitude", "--seeds", "1", "--out", str(out)]
    main(["ablate", "stages=2,4", "metric=latent_mse,latent_cosine", "--genes", "levels", *small])
    table = capsys.readouterr().out
    assert "stages" in table and "latent_cosine" in table
    assert len(json.loads((out / "results.json").read_text())["cells"]) == 4
    assert {
        "results.csv",
        "results.json",
        "table.md",
        "convergence-latent_mse.png",
        "heldout-latent_cosine.png",
        "schedules.png",
    } <= {p.name for p in out.iterdir()}
    assert "Did you mean 'stages'" in fails(capsys, "ablate", "stage=2", *small)
    assert "needs a profile" not in fails(capsys, "ablate", "strategy=mosaic,evolve", *small)


@pytest.mark.slow
def test_operators_and_strategies_take_options(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ["--model", str(tiny_folder), "--method", "magnitude"]
    strategies = {
        "evolution": ["--mutation", "swap_stages"],
        "nsga2:mu=8": [],
        "mosaic": [],
    }
    for i, (strategy, options) in enumerate(strategies.items()):
        search(tmp_path / str(i), *tiny, "--strategy", strategy, *options)
        report = read_report(tmp_path / str(i))
        assert report.run.settings["strategy"] == strategy and report.run.searched.nominal_sparsity >= 0.5
        if strategy.startswith("nsga2"):
            assert len(report.front["searched"]) > 1 and len(report.front["dense, fewer steps"]) > 1
            assert (tmp_path / str(i) / "front.png").stat().st_size > 5000
        else:
            assert report.front == {}
    out = ["--out", str(tmp_path / "no"), *SMALL, *tiny]
    assert "takes no mutation" in fails(
        capsys, "search", "--genes", "levels", *out, "--strategy", "random", "--mutation", "swap_stages"
    )
    assert "Did you mean 'swap_stages'" in fails(
        capsys, "search", "--genes", "levels", *out, "--mutation", "swap_stage"
    )
    assert "Its options:" in fails(capsys, "search", "--genes", "levels", *out, "--strategy", "evolution:nu=4")


@pytest.mark.slow
def test_a_budget_in_macs_is_met_by_the_whole_denoiser(tiny_folder: Path, tmp_path: Path) -> None:
    search(tmp_path / "run", "--model", str(tiny_folder), "--cost", "macs", "--budget", "0.7", "--method", "layer_drop")
    assert read_report(tmp_path / "run").run.searched.macs_fraction <= 0.7001
    assert json.loads((tmp_path / "run" / folder.COSTS).read_text())["cost"] == "macs"


@pytest.mark.slow
def test_evaluations_may_go_to_a_database(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    options = ["--model", str(tiny_folder), "--method", "magnitude", "--storage", url]
    search(tmp_path / "one", *options)
    assert not (tmp_path / "one" / folder.JOURNAL).exists()
    study = optuna.load_study(study_name="one", storage=url)
    assert len(study.trials) == 8
    shutil.rmtree(tmp_path / "one")
    assert "has evaluations" in fails(
        capsys, "search", "--genes", "levels", *SMALL, *options, "--out", str(tmp_path / "one")
    )
    search(tmp_path / "one", *options, "--overwrite", "--max-evals", "3")
    assert len(optuna.load_study(study_name="one", storage=url).trials) == 3


@pytest.mark.slow
def test_same_seed_same_run_and_other_seed_other_run(tiny_folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        search(tmp_path / name, "--model", str(tiny_folder), "--seed", seed)
    a, b, c = (read_report(tmp_path / name) for name in "abc")

    def untimed(report: Report) -> RunRecord:
        rivals = {name: replace(rival, ms=None) for name, rival in report.run.rivals.items()}
        return replace(report.run, searched=replace(report.run.searched, ms=None), rivals=rivals, seconds=0.0)

    assert untimed(a) == untimed(b) and a.front == b.front
    assert a.run.searched != c.run.searched
    assert (tmp_path / "a" / artifact.SCHEDULE).read_bytes() == (tmp_path / "b" / artifact.SCHEDULE).read_bytes()


@pytest.mark.slow
def test_a_killed_search_goes_on_and_ends_in_the_same_place(tiny_folder: Path, tmp_path: Path) -> None:
    options = ["--model", str(tiny_folder), "--max-evals", "60"]
    search(tmp_path / "whole", *options)
    killed = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "diffes.cli",
        "search",
        "--genes",
        "levels",
        *SMALL,
        *options,
        "--out",
        str(killed),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        journal = killed / folder.JOURNAL
        deadline = time.monotonic() + 120
        while not (journal.exists() and journal.stat().st_size > 5000) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (killed / folder.REPORT).exists()
    search(killed, *options)
    whole, resumed = (read_report(tmp_path / name).run for name in ("whole", "killed"))
    assert whole.found == resumed.found and whole.searched.heldout_mean == resumed.searched.heldout_mean
    assert whole.evaluations == resumed.evaluations


@pytest.mark.slow
def test_finished_and_foreign_folders_are_not_overwritten(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    model = ["--model", str(tiny_folder)]
    search(run, *model)
    before = {path: path.read_bytes() for path in run.iterdir()}
    arguments = ["search", "--genes", "levels", *SMALL, *model, "--out", str(run)]
    assert "--overwrite" in fails(capsys, *arguments)
    (run / folder.REPORT).rename(tmp_path / "report")
    assert "heldout was 4 and is 5" in fails(capsys, *arguments, "--heldout", "5")
    assert "max_evals was 8 and is 7" in fails(capsys, *arguments, "--max-evals", "7")
    (tmp_path / "report").rename(run / folder.REPORT)
    assert "unknown metric" in fails(capsys, *arguments, "--overwrite", "--metric", "ssmi")
    assert before == {path: path.read_bytes() for path in run.iterdir()}
    search(run, *model, "--overwrite", "--seed", "1")
    assert json.loads((run / files.CONFIG).read_text())["settings"]["seed"] == 1
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("ten years")
    (foreign / "config.json").write_text('{"settings": {}, "_class_name": "DiTTransformer2DModel"}')
    assert "not a run of diffes" in fails(capsys, "search", "--out", str(foreign), "--overwrite")
    assert (foreign / "thesis.txt").read_text() == "ten years"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "1.2"], "[0, 1]"),
        (["--budget", "-0.1"], "[0, 1]"),
        (["--budget", "nan"], "[0, 1]"),
        (["--method", "obss"], "'obs'"),
        (["--method", "obs:damping=2"], "damping of obs must be in (0, 1], got 2"),
        (["--bank-memory", "0"], "bank_memory must be a finite number of GB above 0, got 0.0"),
        (["--metric", "sim"], "'ssim'"),
        (["--strategy", "evolve"], "'evolution'"),
        (["--model", "fashion_dit"], "'fashion-dit'"),
        (["--stages", "0"], "stages must be at least 1, got 0"),
        (["--stages", "1001"], "[1, 1000], got 1001"),
        (["--max-evals", "0"], "max_evals must be at least 1"),
        (["--guidance", "nan"], "guidance must be"),
        (["--steps", "1001"], "[1, 1000], got 1001"),
        (["--seed", "5000000000"], "below 10^9"),
        (["--metric", "ms_ssim"], "cannot score images"),
        (["--calibration-data", "none.npz"], "none.npz"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "holds no numbers"),
        (["--storage", "study.db"], "is not the URL of a database"),
        (["--storage", "sqlite://"], "is in memory"),
        (["--storage", "sqlite:///:memory:"], "is in memory"),
        (["--strategy", "exhaustive"], "more than 100,000 feasible schedules"),
        (["--time-limit", "0"], "time_limit must be above 0 seconds, got 0"),
        (["--out", "x" * 300], "File name too long"),
        (["--model", "x" * 300], "too long"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_options_are_named(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, "search", "--genes", "levels", "--out", str(tmp_path / "run"), *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calls", "0.5"], "calls must be at least 1, which is what a dense call costs, and at most 1000, got 0.5"),
        (["--calls", "nan"], "calls must be at least 1"),
        (["--budget", "0.3"], "--budget 0.3 sets the budget of schedules"),
        (["--solver", "heun"], "'heun'"),
        (["--nodes", "1"], "nodes must be at least 2"),
        (["--strategy", "exhaustive"], "exhaustive"),
        (["--mutation", "level_step:size=2"], "level_step"),
        (["--storage", "sqlite:///none.db"], "is for --genes levels"),
        (["--genes", "levels", "--calls", "6"], "--calls 6 sets the budget of plans"),
        (["--genes", "levels", "--nodes", "8"], "--nodes 8 is for plans"),
        (["--genes", "levels", "--solver", "ddim"], "--solver ddim is for plans"),
        (["--genes", "layers"], "levels"),
    ],
)
def test_bad_options_of_plans_are_named(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, "search", "--out", str(tmp_path / "run"), *options)
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written_is_one_paragraph(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert "file" in fails(capsys, "search", "--out", str(blocked))
    assert "cannot write" in fails(capsys, "search", "--out", str(blocked / "run"))
    assert "cannot write" in fails(capsys, "search", "--out", "/proc/run")
    assert blocked.read_text() == "in the way"


def test_a_comparison_of_nothing_or_under_a_limit_in_time_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert "strategy has no values" in fails(capsys, "compare", *out, "--strategies")
    assert "--time-limit 5 would cut" in fails(capsys, "compare", *out, "--time-limit", "5")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_more_evaluations_of_a_finished_run_end_where_one_search_ends(tiny_folder: Path, tmp_path: Path) -> None:
    model = ["--model", str(tiny_folder), "--method", "magnitude", "--allocation", "equal"]
    search(tmp_path / "whole", *model, "--max-evals", "30")
    for evals in ("13", "30"):
        search(tmp_path / "parts", *model, "--max-evals", evals)
    whole, parts = (read_report(tmp_path / name).run for name in ("whole", "parts"))
    assert (whole.found, whole.evaluations, whole.denoiser_calls) == (
        parts.found, parts.evaluations, parts.denoiser_calls,
    )  # fmt: skip
    assert whole.searched.heldout_mean == parts.searched.heldout_mean
    assert json.loads((tmp_path / "parts" / files.CONFIG).read_text())["settings"]["max_evals"] == 30
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "parts" / folder.JOURNAL)))
    assert len(optuna.load_study(study_name="diffes", storage=storage).trials) == 30  # none was paid twice


@pytest.mark.slow
def test_a_log_file_has_a_line_for_each_evaluation(tiny_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    model = ["--model", str(tiny_folder), "--method", "magnitude", "--allocation", "equal"]
    search(tmp_path / "run", *model, "--log-file", str(log))
    assert log.read_text().count("levels") == 8


@pytest.mark.slow
def test_operators_of_deap_are_named_like_any_other(tiny_folder: Path, tmp_path: Path) -> None:
    search(
        tmp_path / "run", "--model", str(tiny_folder), "--method", "magnitude", "--max-evals", "12",
        "--strategy", "evolution:initial=4,mu=3", "--mutation", "deap.mutShuffleIndexes:indpb=0.2",
        "--crossover", "deap.cxTwoPoint",
    )  # fmt: skip
    report = read_report(tmp_path / "run").run
    assert report.evaluations == 12 and report.searched.nominal_sparsity == 0.5
    journal = (tmp_path / "run" / folder.JOURNAL).read_text()
    assert '"deap.mutShuffleIndexes:indpb=0.2"' in journal
    assert "deap.cxTwoPoint + deap.mutShuffleIndexes" in journal


@pytest.mark.slow
def test_front_then_sample_by_cost(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "front"
    options = ["--model", str(tiny_folder), *SMALL, "--max-evals", "6", "--nodes", "8", "--budgets", "2", "3"]
    main(["front", *options, "--out", str(out)])
    shown = capsys.readouterr().out
    rows = re.findall(r"^ +([23]) +joint ", shown, flags=re.MULTILINE)
    assert rows == ["2", "3"] and "--calls 3" in " ".join(shown.split())
    with Image.open(out / folder.FRONT) as image:
        assert image.width > image.height > 200
    main(["sample", str(out), "--calls", "2", "--out", str(tmp_path / "grid.png")])
    assert (tmp_path / "grid.png").stat().st_size > 1000
    other = str(tmp_path / "other.png")
    assert "or less. Set calls to" in fails(capsys, "sample", str(out), "--calls", "0.01", "--out", other)
    assert "3 denoiser calls, got steps 33: leave it out" in fails(
        capsys, "sample", str(out), "--steps", "33", "--out", other
    )
    assert "pass --overwrite" in fails(capsys, "front", *options, "--out", str(out))
    assert "unknown solver" in fails(capsys, "front", *options, "--solver", "pndm", "--out", str(tmp_path / "x"))
    assert "take macs or latency" in fails(capsys, "front", *options, "--cost", "level", "--out", str(tmp_path / "x"))
