from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import build_bank
from safetensors.torch import save_file

from diffes.adapters import ModelAdapter, adapter_for, load_pipeline
from diffes.bank import FORMAT, WeightBank, check_fingerprint, fingerprint
from diffes.errors import DiffesError
from diffes.schedule import Schedule, StagePlan


def test_save_and_load_keep_every_bit(tiny: ModelAdapter, plan: StagePlan, tmp_path: Path) -> None:
    bank = build_bank(tiny, "obs", plan).for_schedule(Schedule(plan, (0, 1, 2, 4), 4))
    bank.save(tmp_path / "bank.safetensors", {"method": "obs"})
    loaded, header = WeightBank.open(tmp_path / "bank.safetensors")
    assert header == {"format_version": 1, "kind": "width", "method": "obs"}
    bank.save(tmp_path / "again.safetensors", {"method": "obs"})
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "bank.safetensors").read_bytes()
    assert sorted(loaded) == sorted(bank) == [(1, 1), (2, 2), (3, 4)]
    assert loaded.nbytes == 0  # nothing is read before it is asked for
    assert loaded[2, 2] is loaded[2, 2]  # and nothing twice
    assert loaded.nbytes == sum(weights.nbytes for weights in bank[2, 2].values())
    for key in bank:
        for name, weights in bank[key].items():
            assert torch.equal(loaded[key][name].kept, weights.kept)
            assert torch.equal(loaded[key][name].consumer, weights.consumer)
    assert loaded.nbytes == bank.nbytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_banks_are_half_as_large(
    tiny_sdxl: ModelAdapter, plan: StagePlan, tmp_path: Path, dtype: torch.dtype
) -> None:
    bank = build_bank(tiny_sdxl, "obs", plan).for_schedule(Schedule(plan, (0, 1, 2, 4), 4))
    bank.save(tmp_path / "full", {})
    bank.save(tmp_path / "half", {}, dtype)
    full, half = (WeightBank.open(tmp_path / name)[0] for name in ("full", "half"))
    back, _ = WeightBank.open(tmp_path / "half", torch.float32)
    name = tiny_sdxl.group_sets()[0].name
    assert half[1, 1][name].consumer.dtype == dtype
    assert half[1, 1][name].consumer.nbytes * 2 == full[1, 1][name].consumer.nbytes
    assert (tmp_path / "half").stat().st_size < (tmp_path / "full").stat().st_size
    torch.testing.assert_close(back[1, 1][name].consumer, full[1, 1][name].consumer, rtol=1e-2, atol=1e-3)


def test_depth_banks_say_so(untrained: ModelAdapter, plan: StagePlan, tmp_path: Path) -> None:
    bank = build_bank(untrained, "layer_drop", plan)
    bank.save(tmp_path / "bank.safetensors", {})
    loaded, header = WeightBank.open(tmp_path / "bank.safetensors")
    assert loaded.kind == header["kind"] == "depth"
    assert torch.equal(loaded[3, 1]["blocks"].kept, bank[3, 1]["blocks"].kept)


def test_stages_do_not_depend_on_which_others_are_built(tiny: ModelAdapter, plan: StagePlan) -> None:
    alone, together = build_bank(tiny, "obs", plan, [2]), build_bank(tiny, "obs", plan)
    name = tiny.group_sets()[0].name
    assert torch.equal(alone[2, 1][name].consumer, together[2, 1][name].consumer)


def test_stages_share_what_does_not_depend_on_them(tiny: ModelAdapter, plan: StagePlan) -> None:
    assert build_bank(tiny, "magnitude", plan).nbytes == build_bank(tiny, "magnitude", plan, [0]).nbytes


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "text", "foreign", "newer"])
def test_unreadable_banks_are_refused(tiny: ModelAdapter, plan: StagePlan, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "bank.safetensors"
    build_bank(tiny, "obs", plan, [0]).save(path, {})
    content = path.read_bytes()
    messages = {"missing": "missing", "foreign": "no diffes bank", "newer": "version 2.*newer diffes"}
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        save_file({"x": torch.zeros(2)}, path)
    elif damage == "newer":
        save_file({"x": torch.zeros(2)}, path, metadata={FORMAT: json.dumps({"format_version": 2, "kind": "width"})})
    else:
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(DiffesError, match=messages.get(damage, "is damaged")):
        WeightBank.open(path)


def test_fingerprint_tells_models_apart_but_not_dtypes(tiny: ModelAdapter, tiny_folder: Path, tmp_path: Path) -> None:
    expected = fingerprint(tiny.denoiser)
    for dtype in (torch.float16, torch.bfloat16):
        check_fingerprint(load_pipeline(str(tiny_folder), dtype=dtype).transformer, expected, tmp_path)
    with pytest.raises(DiffesError, match="other layers"):
        check_fingerprint(adapter_for(load_pipeline("fashion-dit")).denoiser, expected, tmp_path)
    with torch.no_grad():
        tiny.denoiser.proj_out_2.weight.add_(0.1)
    with pytest.raises(DiffesError, match="other weights"):
        check_fingerprint(tiny.denoiser, expected, tmp_path)
