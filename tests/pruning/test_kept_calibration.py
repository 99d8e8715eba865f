"""A calibration that was killed goes on where it was, and what it keeps is gone with the end of the run."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Counting, plan_config, small_config

from diffes.adapters import ModelAdapter
from diffes.config import RunConfig
from diffes.errors import DiffesError
from diffes.files import CONFIG
from diffes.problems import workbench as benches
from diffes.problems.workbench import Workbench, prepare
from diffes.pruning.bank import WeightBank
from diffes.pruning.calibrate import Keep, bank_of
from diffes.pruning.calibration import sample_calibration
from diffes.pruning.stage_file import read_stage, write_stage
from diffes.results import folder
from diffes.results.record import Report
from diffes.study.front import complete_front
from diffes.study.run import complete_run

METHODS = ["obs", "wanda", "layer_drop", "obs+block_reuse"]


class Killed(BaseException):
    """A process that ends, wherever it is."""


def killing(monkeypatch: pytest.MonkeyPatch, after: int) -> list[list[int]]:
    """Notes the stages that are calibrated; ends the process once so many were."""
    made: list[list[int]] = []

    def noted(config: RunConfig, adapter: ModelAdapter, stages: Any, only: Any, *args: Any) -> WeightBank:
        if sum(map(len, made)) >= after:
            raise Killed
        made.append(list(only))
        return bank_of(config, adapter, stages, only, *args)

    monkeypatch.setattr(benches, "bank_of", noted)
    return made


def found(report: Report) -> Any:
    return report.run.found, report.run.searched.heldout_mean, report.run.denoiser_calls


def assert_same(one: WeightBank, other: WeightBank) -> None:
    assert (one.kind, one.max_level, one.calls) == (other.kind, other.max_level, other.calls)
    assert list(one) == list(other)
    for key, entry in one.items():
        assert list(entry) == list(other[key])
        for name, weights in entry.items():
            same = other[key][name]
            assert torch.equal(weights.kept, same.kept) and weights.kept.dtype == same.kept.dtype
            assert all(torch.equal(a, b) for a, b in zip(weights.consumers, same.consumers, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_stage_is_read_as_it_was_written(tiny_folder: Path, tmp_path: Path, method: str) -> None:
    bench = prepare(small_config(tiny_folder, method=method, cost="macs"), Counting())
    for stage in bench.space.visited:
        entries = {key: entry for key, entry in bench.router.bank.items() if key[0] == stage}
        bank = WeightBank(entries, bench.router.bank.kind, calls=7, max_level=bench.space.max_level)
        write_stage(tmp_path / "stage.json", bank, bench.adapter)
        read = read_stage(tmp_path / "stage.json", bench.adapter)
        assert_same(bank, read)
        objects = [len({id(w) for entry in each.values() for w in entry.values()}) for each in (bank, read)]
        assert objects[1] <= objects[0]


def test_a_damaged_stage_and_one_of_another_model_are_refused(bench: Workbench, tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    stage = bench.space.visited[0]
    entries = {key: entry for key, entry in bench.router.bank.items() if key[0] == stage}
    bank = WeightBank(entries, bench.router.bank.kind, max_level=bench.space.max_level)
    write_stage(path, bank, bench.adapter)
    tensors = path.with_suffix(".safetensors")
    whole, facts = tensors.read_bytes(), path.read_text()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[: len(whole) // 2], b""):
        tensors.write_bytes(damaged)
        with pytest.raises(DiffesError, match="damaged"):
            read_stage(path, bench.adapter)
    tensors.write_bytes(whole)
    path.write_text(facts.replace('"level": 1', '"level": 2'))
    with pytest.raises(DiffesError, match="was changed after"):
        read_stage(path, bench.adapter)
    path.write_text(facts)
    weight = next(bench.adapter.denoiser.parameters())
    before = weight.data.clone()
    try:
        weight.data += 1
        with pytest.raises(DiffesError, match="of another model"):
            read_stage(path, bench.adapter)
    finally:
        weight.data = before
    assert_same(bank, read_stage(path, bench.adapter))


@pytest.mark.slow
def test_a_killed_calibration_goes_on(base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(base, method="obs", stages=4)
    whole = complete_run(config, tmp_path / "whole", Counting())
    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        made = killing(patch, after=2)
        with pytest.raises(Killed):
            complete_run(config, out, Counting())
    assert len(made) == 2 and (out / CONFIG).exists()
    assert len(list((out / folder.CALIBRATION).glob("stage*.json"))) == 2
    (out / folder.CALIBRATION / f"stage{made[0][0]}.safetensors").write_bytes(b"cut short")
    (out / folder.CALIBRATION / ".partial-stage9.safetensors").write_bytes(b"left behind")
    with monkeypatch.context() as patch:
        again = killing(patch, after=100)
        assert found(complete_run(config, out, Counting())) == found(whole)
    done = {stage for stages in made[1:] for stage in stages}
    assert made[0] in again and done.isdisjoint(stage for stages in again for stage in stages)
    assert not (out / folder.CALIBRATION).exists()


def test_a_search_that_goes_on_calibrates_nothing_again(
    base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: object) -> None:
        raise Killed

    out = tmp_path / "run"
    with pytest.raises(Killed):
        complete_run(base, out, Counting(), on_evaluation=stop)
    made = killing(monkeypatch, after=0)
    complete_run(base, out, Counting())
    assert not made


@pytest.mark.slow
def test_other_settings_use_nothing_of_what_was_kept(
    base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(base, method="obs")
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killing(patch, after=1)
        complete_run(config, out, Counting())
    other = replace(config, seed=5)
    with pytest.raises(DiffesError, match="seed was 0 and is 5"):
        complete_run(other, out, Counting())
    alone = complete_run(other, tmp_path / "alone", Counting())
    assert found(complete_run(other, out, Counting(), overwrite=True)) == found(alone)


def test_samples_of_the_model_are_kept(bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that comes without calibration images."""
    sampling = partial(sample_calibration, bench.adapter, 70, n_steps=2, guidance=1.0, seed=3)
    sampled: list[int] = []
    sample = type(bench.adapter).sample

    def noted(adapter: ModelAdapter, probes: Any, *args: Any) -> torch.Tensor:
        if len(sampled) == 2:
            raise Killed
        sampled.append(len(probes))
        return sample(adapter, probes, *args)

    whole = sampling()
    keep = Keep(lambda: tmp_path / "kept", resumes=False)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(type(bench.adapter), "sample", noted)
        sampling(keep=keep.samples)
    assert sampled == [32, 32]
    (tmp_path / "kept" / "samples32.safetensors").write_bytes(b"cut short")
    sampled.clear()
    with monkeypatch.context() as patch:
        patch.setattr(type(bench.adapter), "sample", noted)
        again = sampling(keep=replace(keep, resumes=True).samples)
    assert sampled == [32, 6]
    assert torch.equal(again.latents, whole.latents) and again.conditions == whole.conditions


@pytest.mark.slow
def test_a_killed_front_keeps_its_calibration(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = plan_config(tiny_folder, method="obs", nodes=6, probes=2, heldout=2, max_evals=4)
    out = tmp_path / "front"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killing(patch, after=2)
        complete_front(config, [2.0], out, Counting())
    made = killing(monkeypatch, after=100)
    complete_front(config, [2.0], out, Counting())
    assert made and len(list(out.glob(folder.CALIBRATION))) == 0
    assert len(made) == len(prepare(config, Counting()).levels.visited) - 2
