from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REFERENCE_STEPS, Counting, images, small_config
from diffusers import DDIMScheduler
from PIL import Image

import diffes
from diffes import files
from diffes.adapters import load_pipeline
from diffes.cli import main
from diffes.errors import DiffesError
from diffes.pruning.bank import WeightBank
from diffes.runtime.artifact import BANK, BASE, FRONT, chosen, read_front, write_front
from diffes.runtime.solver import SPACINGS, spaced
from diffes.search.plan import trailing
from diffes.search.schedule import Plan
from diffes.study import folder
from diffes.study.export import CARD, FILES, export
from diffes.study.front import COLUMNS, KINDS, complete_front, rows_of, searched, verdicts
from diffes.study.plans import Plans
from diffes.study.run import sample_images
from diffes.study.workbench import prepare

BUDGETS = [2.0, 3.0]


def make(model: Path, out: Path, budgets: list[float] = BUDGETS, **changes: Any) -> dict[str, Any]:
    settings = {"method": "obs", "cost": "macs", "probes": 2, "heldout": 2, "max_evals": 12, **changes}
    return complete_front(small_config(model, **settings), budgets, out, Counting(), nodes=10)


@pytest.fixture(scope="module")
def front(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fronts") / "tiny"
    make(tiny_folder, out)
    return out


def test_a_front_holds_every_kind_at_every_budget(front: Path) -> None:
    data = read_front(front)
    assert [(p["budget"], p["kind"]) for p in data["points"]] == [
        (budget, kind) for budget in BUDGETS for kind in KINDS
    ]
    for point in data["points"]:
        assert 0 < point["cost"] <= point["budget"] + 1e-6
        assert point["n_calls"] == len(point["timesteps"]) == len(point["levels"]) == len(point["sigmas"])
        alphas = DDIMScheduler().alphas_cumprod[point["timesteps"]]
        assert point["sigmas"] == pytest.approx(((1 - alphas) / alphas).sqrt().tolist(), rel=1e-5)
        assert point["ms"] > 0 and point["latent_mse"] == pytest.approx(-point["heldout_mean"], rel=1e-4)
        assert point["kind"] in ("joint", "levels") or set(point["levels"]) == {0}
    assert data["currency"] == "macs" and data["solver"] == "dpmsolver++"
    assert data["reference"] == {"solver": "dpmsolver++", "steps": REFERENCE_STEPS}
    assert len(rows_of(data)) == 8 and all(len(row) == len(COLUMNS) for row in rows_of(data))
    for name in (folder.TABLE, folder.COSTS):
        assert (front / name).stat().st_size > 0
    for name in (folder.FRONT, "plans.png", "images.png", "convergence.png"):
        with Image.open(front / name) as image:
            assert min(image.size) > 150 and len(set(image.convert("L").tobytes())) > 10


def test_no_kind_is_worse_on_the_searchs_probes_than_what_it_begins_with(front: Path, tiny_folder: Path) -> None:
    """Planned dense calls against the best of four spacings, plans against both, the paper's levels among them."""
    config = small_config(tiny_folder, method="obs", cost="macs", probes=2, heldout=2, max_evals=8)
    plans = Plans(prepare(config, Counting()), nodes=10)
    points = searched(plans, plans.table(Counting()), 3.0, progress=Counting())
    scores = {p.kind: float(plans.searched.scores(p.genome).mean()) for p in points}
    assert scores["joint"] >= max(scores.values()) and scores["dense-planned"] >= scores["dense"]
    even = [plans.genome(plan_of(plans, spaced(plans.bench.adapter.pipe.scheduler, 3, name))) for name in SPACINGS]
    assert scores["dense"] == max(float(plans.searched.scores(genome).mean()) for genome in even)
    planned, joint = (next(p for p in points if p.kind == kind) for kind in ("dense-planned", "joint"))
    dearest = plans.nodes * config.probes * 2  # rows of the dearest evaluation there is
    assert planned.calls_spent / 2 < joint.calls_spent < planned.calls_spent + dearest
    levels = next(p for p in points if p.kind == "levels")
    plan = plans.searched.plan(levels.genome)
    assert list(plan.timesteps) == trailing(config.steps, 1000) and plans.cost(levels.genome) <= 3.0 + 1e-6
    by_stage: dict[int, set[int]] = {}
    for timestep, level in plan.calls:
        by_stage.setdefault(plan.stages.stage_of(timestep), set()).add(level)
    assert all(len(found) == 1 for found in by_stage.values())
    assert [p.kind for p in searched(plans, plans.table(Counting()), 3.0, "steps", Counting())] == list(KINDS[:2])


def plan_of(plans: Plans, timesteps: list[int]) -> Plan:
    space = plans.bench.space
    return Plan(space.stages, tuple((t, 0) for t in timesteps), space.max_level, plans.solver)


def test_verdicts_say_when_thin_calls_add_nothing() -> None:
    def point(kind: str, mse: float, levels: list[int], ms: float = 1.0) -> dict[str, Any]:
        return {"kind": kind, "budget": 4.0, "latent_mse": mse, "levels": levels, "ms": ms}

    dense = [point("dense", 0.4, [0, 0]), point("dense-planned", 0.2, [0, 0])]
    for joint, said in (
        (point("joint", 0.1, [3, 0], 2.0), "2.00 times less error than as many well-chosen.*4.00 times.*takes 2.00"),
        (point("joint", 0.4, [3, 0]), r"thin calls add nothing \(2.00 times the error"),
        (point("joint", 0.2, [0, 0]), "thin calls add nothing, the best plan found is dense"),
    ):
        (line,) = verdicts({"kind": "width", "points": [*dense, joint]})
        assert line.startswith("4 dense calls: ") and re.search(said, line)
        (line,) = verdicts({"kind": "width+reuse", "points": [*dense, joint]})
        assert re.search(said.replace("thin calls", "thin or reusing calls"), line)
    assert "2.00 times less error than evenly spaced" in verdicts({"kind": "width", "points": dense})[0]


def test_a_killed_front_goes_on_and_ends_the_same(front: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Cut off where only the first budget was searched: the table and its evaluations are not paid for again."""
    out = tmp_path / "front"
    with pytest.raises(RuntimeError, match="killed"):
        complete_front(
            small_config(tiny_folder, method="obs", cost="macs", probes=2, heldout=2, max_evals=12),
            BUDGETS, out, Killing("searching joint, 3 calls"), nodes=10,
        )  # fmt: skip
    assert not (out / "front.json").exists()
    before = (out / folder.TABLE).read_bytes()
    again = make(tiny_folder, out)
    whole = read_front(front)
    assert (out / folder.TABLE).read_bytes() == before
    for one, other in zip(again["points"], whole["points"], strict=True):
        assert {k: v for k, v in one.items() if k != "ms"} == {k: v for k, v in other.items() if k != "ms"}
    with pytest.raises(DiffesError, match="finished run; raise --max-evals"):
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


def test_apply_runs_the_best_plan_within_and_remove_restores(front: Path, tiny_folder: Path) -> None:
    pipe = load_pipeline(str(tiny_folder))
    own, dense = pipe.scheduler, images(pipe, steps=4)
    plan, _ = chosen(front, 2.0)
    assert isinstance(plan, Plan)
    diffes.apply(pipe, front, calls=2)
    assert pipe.scheduler is not own
    once = images(pipe, steps=len(plan.calls))
    assert not np.array_equal(once, dense)
    with pytest.raises(DiffesError, match=f"num_inference_steps={len(plan.calls)}"):
        images(pipe, steps=len(plan.calls) + 1)
    planned, pipe.scheduler = pipe.scheduler, own
    with pytest.raises(DiffesError, match="which the plan that is applied does not visit"):
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
    assert isinstance(plan, Plan) and len(names) == 2 and facts["guidance"] == 2.0
    pipe = diffes.apply(load_pipeline(str(tiny_folder)), front, calls=3)
    again = images(pipe, steps=len(plan.calls))
    assert np.allclose(made.permute(0, 2, 3, 1).numpy(), again)
    assert torch.isfinite(made).all()


def test_the_most_expensive_plan_is_the_best_where_nothing_is_said(front: Path) -> None:
    points = read_front(front)["points"]
    best = max(points, key=lambda point: point["heldout_mean"])
    plan, _ = chosen(front, None)
    assert isinstance(plan, Plan) and list(plan.timesteps) == best["timesteps"] and list(plan.levels) == best["levels"]


def test_bad_input_is_refused(front: Path, run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffesError, match=r"costs 0.1 dense calls or less: they cost \d\.\d\d to"):
        chosen(front, 0.1)
    with pytest.raises(DiffesError, match="holds one schedule, not a front"):
        chosen(run, 4.0)
    with pytest.raises(DiffesError, match="at least one budget"):
        make(tiny_folder, tmp_path / "a", [])
    with pytest.raises(DiffesError, match="none below 1"):
        make(tiny_folder, tmp_path / "b", [3.0, 0.9])  # a thin call could be paid, a dense one cannot
    assert not (tmp_path / "b").exists()
    with pytest.raises(DiffesError, match="holds one schedule, not a front"):
        export(run, tmp_path / "c", calls=4.0)
    with pytest.raises(DiffesError, match=r"costs 0.1 dense calls or less: they cost \d\.\d\d to"):
        export(front, tmp_path / "c", calls=0.1)
    assert not (tmp_path / "c").exists()
    data = json.loads((front / "front.json").read_text())
    data["points"][0]["levels"] = [99] * len(data["points"][0]["levels"])
    copy = tmp_path / "d"
    copy.mkdir()
    for name in ("bank.safetensors", "front.json"):
        (copy / name).write_bytes((front / name).read_bytes())
    files.write_json(copy / "front.json", data)
    with pytest.raises(DiffesError, match="was altered"):
        chosen(copy, None)


def preferring(kind: str, front: Path, copy: Path) -> Path:
    """A copy of a front in which plans of one kind are the best, so that they are the ones that are taken."""
    shutil.copytree(front, copy)
    data = read_front(front)
    better = [p | {"heldout_mean": p["heldout_mean"] + 1e6 * (p["kind"] == kind)} for p in data["points"]]
    write_front(copy, data | {"points": better})
    return copy


@pytest.mark.parametrize("kind", ["joint", "dense-planned"])
def test_an_exported_plan_gives_the_bits_of_the_front(
    kind: str, front: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    source, out = preferring(kind, front, tmp_path / "front"), tmp_path / "out"
    plan, _ = chosen(source, 3)
    assert isinstance(plan, Plan) and any(plan.levels) == (kind == "joint")
    n_steps = len(plan.calls)
    expected = images(diffes.apply(load_pipeline(str(tiny_folder)), source, calls=3), steps=n_steps)
    main(["export", str(source), str(out), "--calls", "3"])
    assert {path.name for path in out.iterdir()} == {FRONT, BANK, BASE, CARD, folder.FRONT} <= FILES
    assert chosen(out, None)[0] == chosen(out, 3)[0] == plan
    assert sorted(WeightBank.open(out / BANK)[0]) == plan.thin()
    (point,) = read_front(out)["points"]
    (row, *_) = rows_of({"points": [point]})
    card = (out / CARD).read_text()
    assert (
        f"| {' | '.join(row)} |" in card
        and card.count(f"\n| {point['budget']:g} |") == 4
        and f"num_inference_steps={n_steps}" in card
    )
    for path in (CARD, FRONT, BANK):
        assert str(tiny_folder).encode() not in (out / path).read_bytes()
    moved = out.rename(tmp_path / "moved")  # its base model with it
    assert np.array_equal(images(diffes.load(moved), steps=n_steps), expected)
    with pytest.raises(DiffesError, match=f"num_inference_steps={n_steps}"):
        images(diffes.load(moved), steps=n_steps + 1)
    options: dict[str, Any] = {"seed": 5, "steps": None, "guidance": None, "device": "cpu"}
    ours, theirs = (sample_images(at, [0, 3], **options, calls=3)[0] for at in (source, moved))
    assert torch.equal(ours, theirs)
    main(["sample", str(moved), "--out", str(tmp_path / "grid.png")])
    export(moved, tmp_path / "again")  # an export is a front of one plan
    assert read_front(tmp_path / "again") == read_front(moved)


def test_an_exported_plan_in_half_precision(front: Path, tmp_path: Path) -> None:
    source, out = preferring("joint", front, tmp_path / "front"), tmp_path / "out"
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


def same(one: dict[str, Any], other: dict[str, Any], n_steps: int) -> bool:
    """Whether two blocks of code left the same images, and pipelines that make the same to the bit."""
    pictures = all(np.array_equal(a, b) for a, b in zip(one["images"], other["images"], strict=True))
    return pictures and np.array_equal(images(one["pipe"], steps=n_steps), images(other["pipe"], steps=n_steps))


def test_the_card_of_a_dense_plan_runs_without_diffes(
    front: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("dense", "dense-planned"):
        export(preferring(kind, front, tmp_path / "front"), tmp_path / kind, calls=3)
        shutil.rmtree(tmp_path / "front")
        plan, _ = chosen(tmp_path / kind, None)
        ours, alone = run_card(tmp_path / kind, monkeypatch)
        assert isinstance(plan, Plan) and alone["timesteps"] == list(plan.timesteps)
        assert not any("diffes" in name for name in alone)
        assert same(ours, alone, len(plan.calls))


def test_the_card_of_a_thin_plan_runs(front: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(preferring("joint", front, tmp_path / "front"), tmp_path / "out", calls=3)
    (ours,) = run_card(tmp_path / "out", monkeypatch)
    assert len(ours["images"]) == 2


@pytest.mark.slow
def test_the_card_gives_a_pipeline_that_takes_them_its_timesteps(
    tiny_sdxl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tiny_sdxl_folder, tmp_path / "made", [2.0], max_evals=6, budget=0.7)
    export(preferring("dense-planned", tmp_path / "made", tmp_path / "front"), tmp_path / "out")
    ours, alone = run_card(tmp_path / "out", monkeypatch)
    text = (tmp_path / "out" / CARD).read_text()
    assert ", timesteps=timesteps," in text and "set_timesteps" not in text
    assert np.array_equal(ours["images"][0], alone["images"][0])
