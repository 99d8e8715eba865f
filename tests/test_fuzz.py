"""Files of a stranger: whatever is in them, they are refused in one sentence, or do what they say."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import images, open_pipe, small_config
from diffusers import DiTPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import diffes
from diffes import files
from diffes.adapters import ModelAdapter
from diffes.adapters.prompts import read_prompts
from diffes.errors import DiffesError
from diffes.pruning.bank import FORMAT
from diffes.pruning.calibration import load_calibration
from diffes.results import folder
from diffes.results.artifact import BANK, FRONT, SCHEDULE, base_model, chosen
from diffes.results.report import read_report
from diffes.spaces.schedule import Schedule, Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.store import EvaluationStore
from diffes.spaces.strategy import Evaluation

SECONDS = 5  # of one input: more is a hang
DEEP = "\0deep"
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 20), st.floats(), st.text(max_size=4),
    st.sampled_from([10**400, -(2**63), 1e308, -1e308, 0.5, "1", [], {}, [[]], {"a": 1}, DEEP, "../..", "\x1b[2J"]),
)  # fmt: skip


def fuzz(n: int) -> Callable[[Any], Any]:
    """Runs a test on so many inputs, the same ones every time."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=n, derandomize=True, database=None, deadline=1000 * SECONDS, suppress_health_check=quiet
    )


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key inside some JSON."""
    keys = list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in keys:
        yield data, key
        yield from places(data[key])


@st.composite
def changed(draw: st.DrawFn, data: Any) -> Any:
    """The data with something replaced, left out or repeated in one or two places."""
    new = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 2))):
        where = list(places(new))
        if not where:
            break
        container, key = where[draw(st.integers(0, len(where) - 1))]
        action = draw(st.sampled_from(["replace", "replace", "replace", "delete", "repeat"]))
        if action == "replace":
            container[key] = copy.deepcopy(draw(JUNK))
        elif action == "delete":
            del container[key]
        elif isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            container[str(key) + "2"] = copy.deepcopy(container[key])
    return new


def dumped(data: Any) -> str:
    return json.dumps(data).replace(json.dumps(DEEP), "[" * 3000 + "]" * 3000)


def sealed(data: Any) -> str:
    """As somebody writes it who knows how checksums are made."""
    return dumped({**data, "checksum": files.checksum(data)})


def refused(action: Callable[[], Any]) -> Any:
    """What the action returns; None where it refuses, which it may only do in one short paragraph."""
    try:
        return action()
    except DiffesError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500
        return None


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


@pytest.fixture
def fuzzed(run: Path, scratch: Path) -> Path:
    """A copy of a run that tests may change."""
    copied = scratch / "run"
    if not copied.exists():
        shutil.copytree(run, copied)
    for name in (SCHEDULE, BANK, folder.REPORT, folder.COSTS, files.CONFIG):
        shutil.copy2(run / name, copied / name)
    (copied / FRONT).unlink(missing_ok=True)
    return copied


class Check:
    """Applies a changed run to a pipeline, and looks what it did.

    Args:
        pipe: the dense pipeline.
        run: the run as it was.
    """

    def __init__(self, pipe: DiTPipeline, run: Path) -> None:
        self.pipe = pipe
        self.schedule, _ = chosen(run, None)
        diffes.apply(pipe, run)
        self.images = images(pipe, 2)
        diffes.remove(pipe)
        self.dense = [(p, p.data_ptr()) for p in pipe.transformer.parameters()]

    def __call__(self, changed_run: Path, *, same_weights: bool = True) -> None:
        """Refused, or the same images of the same schedule; the pipeline is dense again."""
        if refused(lambda: diffes.apply(self.pipe, changed_run)) is not None:
            if same_weights and chosen(changed_run, None)[0] == self.schedule:
                np.testing.assert_array_equal(images(self.pipe, 2), self.images)
            diffes.remove(self.pipe)
        assert all(p.data_ptr() == pointer for p, pointer in self.dense)
        assert not self.pipe.transformer._forward_pre_hooks


@pytest.fixture
def check_applied(tiny_folder: Path, run: Path) -> Check:
    return Check(open_pipe(tiny_folder), run)


@pytest.mark.slow
def test_schedules(run: Path, fuzzed: Path, check_applied: Check) -> None:
    data = files.read_json(run / SCHEDULE)

    @fuzz(150)
    @given(changed(data))
    def check(content: Any) -> None:
        (fuzzed / SCHEDULE).write_text(sealed(content))
        check_applied(fuzzed)

    check()


def test_bytes_of_any_file(run: Path, fuzzed: Path, check_applied: Check) -> None:
    @fuzz(70)
    @given(st.sampled_from([SCHEDULE, BANK]), st.integers(0, 10**6), st.binary(max_size=3))
    def check(name: str, at: int, what: bytes) -> None:
        content = (run / name).read_bytes()
        at %= len(content)
        (fuzzed / name).write_bytes(content[:at] + what + content[at + len(what) :])
        check_applied(fuzzed)
        shutil.copy2(run / name, fuzzed / name)

    check()


def test_headers_of_banks(run: Path, fuzzed: Path, check_applied: Check) -> None:
    facts = files.read_json(run / SCHEDULE)
    with safe_open(run / BANK, framework="pt") as file:
        header, tensors = json.loads(file.metadata()[FORMAT]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    @fuzz(90)
    @given(changed(header))
    def check(content: Any) -> None:
        save_file(tensors, fuzzed / BANK, metadata={FORMAT: dumped(content)})
        theirs = facts | {"bank_sha256": files.file_sha256(fuzzed / BANK)}
        (fuzzed / SCHEDULE).write_text(sealed(theirs | {"split": content.get("split", facts["split"])}))
        check_applied(fuzzed)

    check()


TENSORS = st.sampled_from(
    [
        lambda x: x[:-1], lambda x: x.flip(0), lambda x: x * 2, lambda x: x - 1, lambda x: x.float(),
        lambda x: x.to(torch.int32), lambda x: x[None], lambda x: x.clamp(max=0), lambda x: x[:0],
        lambda x: x.to(torch.float64) * float("nan"), lambda x: x.to(torch.float32) / 0, lambda x: torch.cat([x, x]),
        lambda x: x.to(torch.int64) * 2**40, lambda x: torch.zeros(()), lambda x: x.bool(), lambda x: None,
    ]
)  # fmt: skip


def test_tensors_of_banks(run: Path, fuzzed: Path, check_applied: Check) -> None:
    facts = files.read_json(run / SCHEDULE)
    with safe_open(run / BANK, framework="pt") as file:
        header, tensors = file.metadata()[FORMAT], {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    @fuzz(70)
    @given(st.sampled_from(sorted(tensors)), TENSORS)
    def check(name: str, change: Callable[[Any], Any]) -> None:
        new = tensors | {name: change(tensors[name])}
        whole = {key: tensor.contiguous() for key, tensor in new.items() if tensor is not None}
        save_file(whole, fuzzed / BANK, metadata={FORMAT: header})
        (fuzzed / SCHEDULE).write_text(sealed(facts | {"bank_sha256": files.file_sha256(fuzzed / BANK)}))
        same = name in whole and torch.equal(whole[name].double(), tensors[name].double())
        check_applied(fuzzed, same_weights=same)

    check()


def front_of(facts: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a front with the bank of a run."""
    point = {
        "kind": "joint", "budget": 4.0, "cost": 3.5, "n_calls": 2, "heldout_mean": -0.1, "heldout_std": 0.01,
        "latent_mse": 0.1, "timesteps": [800, 300], "sigmas": [9.0, 1.0], "levels": [0, 0], "calls_spent": 9, "ms": 1.5,
    }  # fmt: skip
    return facts | {
        "reference": {"solver": "ddim", "steps": 200}, "solver": "ddim", "currency": "macs", "metric": "latent_mse",
        "nodes": 8, "points": [point, point | {"cost": 2.0, "heldout_mean": None}],
    }  # fmt: skip


def test_fronts(run: Path, fuzzed: Path, check_applied: Check) -> None:
    data = front_of(files.read_json(run / SCHEDULE))
    (fuzzed / FRONT).write_text(sealed(data))
    plain, _ = chosen(fuzzed, None)
    (fuzzed / SCHEDULE).unlink()

    @fuzz(150)
    @given(changed(data), st.sampled_from([None, 3.0, 4.0]))
    def check(content: Any, calls: float | None) -> None:
        (fuzzed / FRONT).write_text(sealed(content))
        found = refused(lambda: chosen(fuzzed, calls))
        assert found is None or found[0] == plain or content != data
        check_applied(fuzzed, same_weights=False)

    check()


def test_reports_configurations_and_costs(run: Path, fuzzed: Path, tiny_folder: Path) -> None:
    report, config, costs = (files.read_json(run / name) for name in (folder.REPORT, files.CONFIG, folder.COSTS))
    settings_of_run = small_config(tiny_folder, method="obs")

    @fuzz(150)
    @given(changed(report))
    def check_report(content: Any) -> None:
        (fuzzed / folder.REPORT).write_text(dumped(content))
        refused(lambda: read_report(fuzzed).to_json())

    @fuzz(60)
    @given(changed(config))
    def check_config(content: Any) -> None:
        (fuzzed / files.CONFIG).write_text(dumped(content))
        refused(lambda: folder.open_run(fuzzed, settings_of_run, overwrite=False))

    @fuzz(100)
    @given(changed(costs), st.booleans())
    def check_costs(content: Any, knows: bool) -> None:
        (fuzzed / folder.COSTS).write_text(sealed(content) if knows else dumped(content))
        found = refused(lambda: folder.known_costs(fuzzed))
        assert found is None or (
            np.isfinite(np.concatenate(found)).all() and (knows or "checksum" not in content or content == costs)
        )

    check_report()
    check_config()
    check_costs()


STAGES = Stages.equal(3)
SPACE = SearchSpace.mean_sparsity(STAGES, 8, 0.5)


def test_journals(scratch: Path) -> None:
    whole = scratch / "whole.journal"
    store = EvaluationStore(whole, SPACE)
    for levels in ((4, 4, 4), (8, 0, 4), (1, 2, 3)):
        store.add(Evaluation(Schedule(STAGES, levels, 8), -float(sum(levels)) / 7, 320, 1.25))
    paid, lines = store.evaluations(), whole.read_text().splitlines()
    path = scratch / "study.journal"

    @fuzz(250)
    @given(st.data(), st.integers(0, len(lines) - 1))
    def check(data: st.DataObject, i: int) -> None:
        line = dumped(data.draw(changed(json.loads(lines[i]))))
        path.write_text("\n".join([*lines[:i], line, *lines[i + 1 :]]) + "\n")
        found = refused(lambda: EvaluationStore(path, SPACE).evaluations())
        assert found is None or set(found) <= set(paid)

    check()


TEXTS = {"search": ["a cat", "a dog"], "heldout": ["a cow"], "calibration": ["a hen"]}


def test_prompts(scratch: Path) -> None:
    @fuzz(150)
    @given(changed(TEXTS))
    def check(content: Any) -> None:
        (scratch / "prompts.json").write_text(dumped(content))
        found = refused(lambda: read_prompts(scratch / "prompts.json"))
        assert found is None or all(isinstance(text, str) and text for each in found.values() for text in each)

    check()


ARRAYS = st.tuples(
    st.sampled_from(["u1", "f4", "i8", "U3", "c8", "?"]), st.lists(st.integers(0, 4), max_size=4), st.integers(-5, 9)
).map(lambda of: np.full(of[1], of[2]).astype(of[0]))


def test_calibration_data(tiny: ModelAdapter, scratch: Path) -> None:
    good: dict[str, Any] = {"images": np.zeros((4, 3, 16, 16), np.uint8), "labels": np.arange(4)}

    @fuzz(120)
    @given(st.sampled_from(["images", "labels"]), st.one_of(ARRAYS, st.just(None)), st.integers(0, 3))
    def check(name: str, array: Any, cut: int) -> None:
        arrays: dict[str, Any] = {k: v for k, v in (good | {name: array}).items() if v is not None}
        np.savez(scratch / "c.npz", **arrays)
        content = (scratch / "c.npz").read_bytes()
        (scratch / "c.npz").write_bytes(content[: len(content) - cut * 30])
        found = refused(lambda: load_calibration(tiny, scratch / "c.npz", 4))
        assert found is None or set(found.conditions) <= set(tiny.choices("search"))

    check()


@pytest.mark.parametrize(
    "model", ["../base", "./../base", "./base/../../x", "base", "/etc", "~/x", "a/b/c", "./link", "..", "-x/y", "a/.."]
)
def test_a_base_model_elsewhere_is_refused(tmp_path: Path, model: str) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "link").symlink_to("/etc")
    with pytest.raises(DiffesError, match="was made for the model"):
        base_model(tmp_path / "export", model)


def test_a_base_model_of_its_own_a_shipped_and_a_hub_one_are_taken(tmp_path: Path) -> None:
    for model in ("fashion-dit", "owner/name", "a/b.c-d"):
        assert base_model(tmp_path, model) == model
    assert base_model(tmp_path, "./base") == str(tmp_path / "base")
