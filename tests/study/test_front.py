from __future__ import annotations

import json
import math
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REFERENCE_STEPS, Counting, images, plan_config
from diffusers import DDIMScheduler
from PIL import Image

import diffes
from diffes import files
from diffes.adapters import load_pipeline
from diffes.cli import main
from diffes.errors import DiffesError
from diffes.figures.tables import COLUMNS, rows_of, verdicts
from diffes.forms import FrontRecord, PlanPoint
from diffes.problems.plans import Plans
from diffes.problems.workbench import prepare
from diffes.pruning.bank import WeightBank
from diffes.results import folder
from diffes.results.artifact import BANK, BASE, FRONT, chosen, read_front, write_front
from diffes.solvers.offtheshelf import SPACINGS
from diffes.spaces.plan import trailing
from diffes.spaces.schedule import Plan
from diffes.study.export import CARD, FILES, export
from diffes.study.front import KINDS, complete_front, searched
from diffes.study.run import sample_images

BUDGETS = [2.0, 3.0]
FIT_PROBES = 3


def make(model: Path, out: Path, budgets: list[float] = BUDGETS, **changes: Any) -> FrontRecord:
    settings = {"method": "obs", "cost": "macs", "probes": 2, "heldout": 2, "max_evals": 12, **changes}
    return complete_front(plan_config(model, nodes=10, fit_probes=FIT_PROBES, **settings), budgets, out, Counting())


@pytest.fixture(scope="module")
def front(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fronts") / "tiny"
    make(tiny_folder, out)
    return out


@pytest.mark.slow
def test_a_front_holds_every_kind_at_every_budget(front: Path) -> None:
    data = read_front(front)
    assert [(p.budget, p.kind) for p in data.points] == [(budget, kind) for budget in BUDGETS for kind in KINDS]
    for point in map(PlanPoint.model_dump, data.points):
        assert 0 < point["cost"] <= point["budget"] + 1e-6
        assert point["n_calls"] == len(point["timesteps"]) == len(point["levels"]) == len(point["sigmas"])
        alphas = DDIMScheduler().alphas_cumprod[point["timesteps"]]
        assert point["sigmas"] == pytest.approx(((1 - alphas) / alphas).sqrt().tolist(), rel=1e-5)
        assert point["ms"] > 0 and point["latent_mse"] == pytest.approx(-point["heldout_mean"], rel=1e-4)
        assert point["latent_interval"][0] <= point["latent_mse"] <= point["latent_interval"][1]
        assert point["latent_median"] > 0 and point["image_mse"] > 0 and 0 < point["variance"] < 2
        assert 0 < point["ssim"] < 1 and point["ssim_error"] > 0
        assert len(point["coefficients"][0]) == 2 and len(point["coefficients"]) == point["n_calls"]
        assert point["kind"] in ("joint", "levels") or set(point["levels"]) == {0}
        assert point["solver"] == "fitted" or point["kind"] in ("dense", "off-the-shelf", "dense-planned", "levels")
    assert data.currency == "macs" and data.solver == "fitted" and data.prediction_type == "epsilon"
    reference = data.reference
    assert (reference.solver, reference.steps) == ("dpmsolver++", REFERENCE_STEPS)
    assert (reference.spacing, reference.final_sigma) == ("trailing", 0.0)
    assert data.reference_calls == REFERENCE_STEPS * 2 * (2 + FIT_PROBES)
    assert len(rows_of(data.points)) == 12 and all(len(row) == len(COLUMNS) for row in rows_of(data.points))
    assert (front / folder.COSTS).stat().st_size > 0
    for name in (folder.FRONT, "plans.png", "images.png", "convergence.png"):
        with Image.open(front / name) as image:
            assert min(image.size) > 150 and len(set(image.convert("L").tobytes())) > 10


@pytest.mark.slow
def test_no_kind_is_worse_on_the_probes_of_the_fit_than_what_it_could_do_without(tiny_folder: Path) -> None:
    config = plan_config(tiny_folder, method="obs", nodes=10, fit_probes=FIT_PROBES, probes=2, heldout=2, max_evals=8)
    plans = Plans(prepare(config, Counting()))
    points = {point.kind: point for point in searched(plans, 3.0, progress=Counting())}
    assert list(points) == list(KINDS)
    for kind, point in points.items():
        measured = float(plans.refitted.scores(point.plan).mean())
        assert measured == pytest.approx(point.final.fitness, rel=1e-6), kind
    fitness = {kind: point.final.fitness for kind, point in points.items()}
    assert fitness["joint"] >= fitness["dense-fitted"] >= fitness["dense-planned"] >= fitness["dense"]
    assert fitness["joint"] == max(fitness.values())
    even = [plans.of_dense(timesteps, "dpmsolver++") for timesteps in plans.spaced(3.0)]
    assert len(even) == len(SPACINGS) and points["dense"].plan in even
    planned, joint = points["dense-fitted"].found, points["joint"].found
    assert planned is not None and joint is not None
    most = plans.nodes * config.probes * 2  # rows of the most expensive evaluation there is
    assert planned.denoiser_calls / 2 < joint.denoiser_calls < planned.denoiser_calls + most
    plan = points["levels"].plan
    assert list(plan.timesteps) == trailing(config.steps, 1000) and plans.cost(plan) <= 3.0 + 1e-6
    by_stage: dict[int, set[int]] = {}
    for timestep, level in plan.calls:
        by_stage.setdefault(plan.stages.stage_of(timestep), set()).add(level)
    assert all(len(found) == 1 for found in by_stage.values())


@pytest.mark.slow
def test_kinds_follow_what_is_searched_and_the_solver(tiny_folder: Path) -> None:
    config = plan_config(tiny_folder, fit_probes=2, probes=2, heldout=2, max_evals=3)
    bench = prepare(config, Counting())
    for genes, solver, kinds in (
        ("steps", "fitted", KINDS[:4]),
        ("steps", "dpmsolver++", KINDS[:3]),
        ("joint", "ddim", (*KINDS[:3], *KINDS[4:])),
    ):
        plans = Plans(bench, solver)
        points = searched(plans, 2.0, genes, Counting())  # type: ignore[arg-type]
        assert tuple(point.kind for point in points) == kinds
        assert points[-1].plan.solver in (solver, "dpmsolver++")


def test_verdicts_say_what_each_part_adds() -> None:
    def point(kind: str, mse: float, levels: list[int], ms: float = 1.0, fit: float | None = None) -> PlanPoint:
        fit_mean = -mse if fit is None else fit
        return PlanPoint.model_construct(
            kind=kind, budget=4.0, latent_mse=mse, heldout_mean=-mse, fit_mean=fit_mean, levels=levels, ms=ms
        )

    dense = [point("dense", 0.4, [0, 0]), point("dense-planned", 0.2, [0, 0]), point("dense-fitted", 0.1, [0, 0])]
    for joint, said in (
        (
            point("joint", 0.05, [3, 0], 2.0),
            "pruned calls have 2.00 times less error than dense-fitted in 2.00 times its milli",
        ),
        (point("joint", 0.2, [3, 0]), r"pruned calls add nothing on held-out probes \(2.00 times the error"),
        (point("joint", 0.1, [0, 0]), "pruned calls add nothing, the best plan found is dense"),
    ):
        (line,) = verdicts(FrontRecord.model_construct(kind="width", points=[*dense, joint]))
        assert line.startswith("4 dense calls: fitted coefficients have 2.00 times less error than 2M at timesteps")
        assert re.search(said, line) and "4.00 times less than 2M at evenly" in line
        (line,) = verdicts(FrontRecord.model_construct(kind="width+reuse", points=[*dense, joint]))
        assert re.search(said.replace("pruned calls", "pruned or reusing calls"), line)
    assert (
        "2.00 times less error than evenly spaced"
        in verdicts(FrontRecord.model_construct(kind="width", points=dense[:2]))[0]
    )


def test_a_verdict_names_the_fastest_plan_at_an_error_by_what_the_search_ranks() -> None:
    def point(kind: str, budget: float, ms: float, fit: float, held: float) -> PlanPoint:
        return PlanPoint.model_construct(
            kind=kind, budget=budget, ms=ms, fit_mean=-fit, latent_mse=held, heldout_mean=-held, levels=[0]
        )

    points = [
        point("dense", 6, 6.0, 0.4, 0.4), point("dense-planned", 6, 6.0, 0.2, 0.2),
        point("dense-fitted", 4, 4.0, 0.1, 0.3), point("dense-fitted", 3, 3.0, 0.3, 0.1),
        point("dense-fitted", 6, 6.0, 0.05, 0.05),
    ]  # fmt: skip
    (line,) = verdicts(FrontRecord.model_construct(kind="width", points=points))
    assert "fastest at the error of dense-planned: dense-fitted of 4, 4 of 6 ms" in line


@pytest.mark.slow
def test_a_killed_front_goes_on_and_ends_the_same(front: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Cut off in the middle of the second budget: what was measured is not paid for again."""
    out = tmp_path / "front"
    with pytest.raises(RuntimeError, match="killed"):
        complete_front(
            plan_config(
                tiny_folder, method="obs", nodes=10, fit_probes=FIT_PROBES, probes=2, heldout=2, max_evals=12
            ),
            BUDGETS, out, Killing("searching joint, fitted, 3 calls"),
        )  # fmt: skip
    assert not (out / "front.json").exists()
    before = (out / folder.JOURNALS / "dense-fitted-3.journal").read_bytes()
    again = make(tiny_folder, out)
    whole = read_front(front)
    assert (out / folder.JOURNALS / "dense-fitted-3.journal").read_bytes().startswith(before)
    for one, other in zip(again.points, whole.points, strict=True):
        assert one.model_copy(update={"ms": 1.0}) == other.model_copy(update={"ms": 1.0})
    with pytest.raises(DiffesError, match=r"finished run\. Raise --max-evals"):
        make(tiny_folder, out)


class Killing(Counting):
    """Progress of a process that dies when a task begins."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self._title = title

    def task(self, title: str, total: int) -> Any:
        if title == self._title:
            raise RuntimeError("killed")
        return super().task(title, total)


@pytest.mark.slow
def test_apply_runs_the_best_plan_within_and_remove_restores(front: Path, tiny_folder: Path) -> None:
    pipe = load_pipeline(str(tiny_folder))
    own, dense = pipe.scheduler, images(pipe, steps=4)
    plan, _ = chosen(front, 2.0)
    assert isinstance(plan, Plan)
    diffes.apply(pipe, front, calls=2)
    assert pipe.scheduler is not own
    once = images(pipe, steps=len(plan.calls))
    assert not np.array_equal(once, dense)
    with pytest.warns(
        UserWarning, match=f"makes {len(plan.calls)} denoiser calls, so num_inference_steps=50 has no effect here"
    ):
        assert np.array_equal(images(pipe, steps=50), once)
    planned, pipe.scheduler = pipe.scheduler, own
    with pytest.raises(DiffesError, match="which is not the next call of the plan that is applied"):
        images(pipe, steps=4)
    pipe.scheduler = planned
    diffes.apply(pipe, front)  # over it: the best of all
    diffes.apply(pipe, front, calls=2)
    assert np.array_equal(images(pipe, steps=len(plan.calls)), once)
    diffes.remove(pipe)
    assert pipe.scheduler is own and np.array_equal(images(pipe, steps=4), dense)


def test_the_plan_of_a_pipeline_is_the_librarys_own_run(front: Path, tiny_folder: Path) -> None:
    made, names = sample_images(front, [0, 3], seed=5, steps=None, guidance=None, device="cpu", calls=3)
    plan, facts = chosen(front, 3)
    assert isinstance(plan, Plan) and len(names) == 2 and facts.guidance == 2.0
    pipe = diffes.apply(load_pipeline(str(tiny_folder)), front, calls=3)
    again = images(pipe, steps=len(plan.calls))
    assert np.allclose(made.permute(0, 2, 3, 1).numpy(), again)
    assert torch.isfinite(made).all()


def test_the_most_expensive_plan_is_the_best_where_nothing_is_said(front: Path) -> None:
    points = read_front(front).points
    best = max(points, key=lambda point: point.fit_mean or -math.inf)
    plan, _ = chosen(front, None)
    assert isinstance(plan, Plan) and list(plan.timesteps) == best.timesteps and list(plan.levels) == best.levels


def test_bad_input_is_refused(front: Path, run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffesError, match=r"costs 0.1 dense calls or less. Set calls to \d\.\d\d or more"):
        chosen(front, 0.1)
    with pytest.raises(DiffesError, match="holds one schedule and no plans"):
        chosen(run, 4.0)
    with pytest.raises(DiffesError, match="at least one budget"):
        make(tiny_folder, tmp_path / "a", [])
    with pytest.raises(DiffesError, match="none below 1"):
        make(tiny_folder, tmp_path / "b", [3.0, 0.9])  # a thin call could be paid, a dense one cannot
    assert not (tmp_path / "b").exists()
    with pytest.raises(DiffesError, match="budgets must differ"):
        make(tiny_folder, tmp_path / "b", [2.0, 2.0000001])
    with pytest.raises(DiffesError, match="'unipc' has no coefficients to fit, and --genes steps"):
        complete_front(plan_config(tiny_folder, genes="steps", solver="unipc"), [2.0], tmp_path / "b", Counting())
    for calls in ("3", True, [3], -1):
        with pytest.raises(DiffesError, match="calls must be a number above 0"):
            chosen(front, calls)  # type: ignore[arg-type]
    with pytest.raises(DiffesError, match="holds one schedule and no plans"):
        export(run, tmp_path / "c", calls=4.0)
    with pytest.raises(DiffesError, match=r"costs 0.1 dense calls or less. Set calls to \d\.\d\d or more"):
        export(front, tmp_path / "c", calls=0.1)
    assert not (tmp_path / "c").exists()
    data = json.loads((front / "front.json").read_text())
    data["points"][0]["levels"] = [99] * len(data["points"][0]["levels"])
    copy = tmp_path / "d"
    copy.mkdir()
    for name in ("bank.safetensors", "front.json"):
        (copy / name).write_bytes((front / name).read_bytes())
    files.write_json(copy / "front.json", data)
    with pytest.raises(DiffesError, match="was changed after it was written"):
        chosen(copy, None)


def preferring(kind: str, front: Path, copy: Path) -> Path:
    """A copy of a front in which plans of one kind are the best, so that they are the ones that are taken."""
    shutil.copytree(front, copy)
    data = read_front(front)
    better = [p.model_copy(update={"fit_mean": (p.fit_mean or 0) + 1e6 * (p.kind == kind)}) for p in data.points]
    write_front(copy, data.model_copy(update={"points": better}))
    return copy


@pytest.mark.parametrize("kind", ["levels", "dense-fitted"])
def test_an_exported_plan_gives_the_bits_of_the_front(
    kind: str, front: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    source, out = preferring(kind, front, tmp_path / "front"), tmp_path / "out"
    plan, _ = chosen(source, 3)
    assert isinstance(plan, Plan) and any(plan.levels) == (kind == "levels")
    n_steps = len(plan.calls)
    expected = images(diffes.apply(load_pipeline(str(tiny_folder)), source, calls=3), steps=n_steps)
    main(["export", str(source), str(out), "--calls", "3"])
    assert {path.name for path in out.iterdir()} == {FRONT, BANK, BASE, CARD, folder.FRONT} <= FILES
    assert chosen(out, None)[0] == chosen(out, 3)[0] == plan
    assert sorted(WeightBank.open(out / BANK)[0]) == plan.pruned()
    (point,) = read_front(out).points
    (row, *_) = rows_of([point])
    card = (out / CARD).read_text()
    assert (
        f"| {' | '.join(row)} |" in card
        and card.count(f"\n| {point.budget:g} |") == len(KINDS)
        and f"makes its {n_steps} calls" in card
    )
    for path in (CARD, FRONT, BANK):
        assert str(tiny_folder).encode() not in (out / path).read_bytes()
    moved = out.rename(tmp_path / "moved")  # its base model with it
    assert np.array_equal(images(diffes.load(moved), steps=n_steps), expected)
    with pytest.warns(UserWarning, match=f"makes {n_steps} denoiser calls"):
        assert np.array_equal(images(diffes.load(moved), steps=n_steps + 1), expected)
    options: dict[str, Any] = {"seed": 5, "steps": None, "guidance": None, "device": "cpu"}
    ours, theirs = (sample_images(at, [0, 3], **options, calls=3)[0] for at in (source, moved))
    assert torch.equal(ours, theirs)
    main(["sample", str(moved), "--out", str(tmp_path / "grid.png")])
    export(moved, tmp_path / "again")  # an export is a front of one plan
    assert read_front(tmp_path / "again") == read_front(moved)


def test_an_exported_plan_in_half_precision(front: Path, tmp_path: Path) -> None:
    source, out = preferring("levels", front, tmp_path / "front"), tmp_path / "out"
    plan, _ = chosen(source, 3)
    assert isinstance(plan, Plan)
    sizes = []
    for dtype in ("float32", "float16"):
        with pytest.raises(DiffesError, match="--overwrite") if out.exists() else nullcontext():
            export(source, out, calls=3)
        export(source, out, calls=3, dtype=dtype, overwrite=True)
        sizes.append((out / BANK).stat().st_size)
        assert np.isfinite(images(diffes.load(out), steps=len(plan.calls))).all()
    assert sizes[1] < 0.9 * sizes[0]


def test_an_export_that_fails_leaves_what_was_there(front: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("ten years")
    for overwrite in (False, True):
        with pytest.raises(DiffesError, match="name another folder"):
            export(front, out, calls=2, overwrite=overwrite)
    with pytest.raises(DiffesError, match="cannot write"):
        export(front, Path("/proc/nowhere"))
    copy = preferring("joint", front, tmp_path / "front")
    (copy / folder.FRONT).unlink()
    with pytest.raises(DiffesError, match=r"front\.png is missing"):
        export(copy, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["front", "out"]
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def run_card(out: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the blocks of code in a card leave, each run for itself where the card says it lies."""
    monkeypatch.chdir(out.parent)
    found: list[dict[str, Any]] = []
    for block in re.findall(r"```python\n(.*?)```", (out / CARD).read_text(), re.DOTALL):
        found.append({})
        exec(block, found[-1])
    return found


@pytest.mark.parametrize("kind", ["off-the-shelf", "dense-fitted", "levels"])
def test_the_plain_loop_of_a_card_samples_as_the_pipeline_does(
    kind: str, front: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of plans of dense calls without diffes; the same noise gives the same images within rounding."""
    export(preferring(kind, front, tmp_path / "front"), tmp_path / kind, calls=3)
    plan, _ = chosen(tmp_path / kind, None)
    ours, alone = run_card(tmp_path / kind, monkeypatch)
    assert isinstance(plan, Plan) and alone["timesteps"] == list(plan.timesteps)
    assert any("diffes" in name for name in alone) == any(plan.levels)
    text = (tmp_path / kind / CARD).read_text()
    loop = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len([line for line in loop.splitlines() if line]) <= 25
    pictures = (alone["images"] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    theirs = np.stack([np.asarray(image) for image in ours["images"]]) / 255
    assert np.abs(pictures - theirs).max() < 0.01
    dense = diffes.remove(ours["pipe"])
    assert np.abs(images(dense, steps=len(plan.calls))[0] - pictures[0]).max() > 0.01


@pytest.mark.slow
def test_the_plain_loop_of_a_text_to_image_plan(
    tiny_sdxl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tiny_sdxl_folder, tmp_path / "made", [2.0], max_evals=6)
    for kind in ("dense-fitted", "levels"):
        export(preferring(kind, tmp_path / "made", tmp_path / f"front-{kind}"), tmp_path / kind)
        ours, alone = run_card(tmp_path / kind, monkeypatch)
        assert len(ours["images"]) == 1 and alone["images"].shape[:2] == (2, 3)
        assert bool(alone["images"].isfinite().all())


def test_a_front_of_format_1_still_runs(front: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Its plans name no solver and no coefficients, and are chosen by what they were reported with."""
    old = shutil.copytree(front, tmp_path / "old")
    data = json.loads((front / FRONT).read_text())
    newer = ("solver", "coefficients", "fit_mean", "latent_median", "latent_interval", "image_mse", "image_mse_error",
             "ssim", "ssim_error", "variance")  # fmt: skip
    points = [{k: v for k, v in p.items() if k not in newer} for p in data["points"] if p["kind"] == "dense-planned"]
    kept = {k: v for k, v in data.items() if k not in ("prediction_type", "fit_probes", "search_probes")}
    kept |= {"solver": "dpmsolver++", "reference": {"solver": "dpmsolver++", "steps": 200}, "points": points}
    kept["bank_sha256"] = files.file_sha256(old / BANK)
    files.write_sealed(old / FRONT, kept | {"format_version": 1})
    plan, _ = chosen(old, 3)
    assert isinstance(plan, Plan) and plan.solver == "dpmsolver++" and plan.coefficients is None
    pipe = diffes.apply(load_pipeline(str(tiny_folder)), old, calls=3)
    assert np.isfinite(images(pipe, steps=len(plan.calls))).all()
    assert rows_of(read_front(old).points) and verdicts(read_front(old)) == []
    export(old, tmp_path / "out", calls=3)
    assert np.array_equal(images(diffes.load(tmp_path / "out"), steps=3), images(pipe, steps=3))


def test_a_plan_for_another_process_or_prediction_is_refused(front: Path, tiny_folder: Path) -> None:
    for change, said in (
        ({"prediction_type": "v_prediction"}, "predicts epsilon, and this pipeline predicts v_prediction"),
        ({"beta_end": 0.03}, r"made for a model with sigma [\d.]+ at timestep"),
    ):
        pipe = load_pipeline(str(tiny_folder))
        own = pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **change)
        dense = images(pipe, steps=3)
        with pytest.raises(DiffesError, match=said):
            diffes.apply(pipe, front, calls=3)
        assert pipe.scheduler is own and np.array_equal(images(pipe, steps=3), dense)
