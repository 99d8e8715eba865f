from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import small_bank
from safetensors import safe_open
from safetensors.torch import save_file

from diffes.adapters import ModelAdapter, adapter_for, load_pipeline
from diffes.errors import DiffesError
from diffes.pruning import METHODS
from diffes.pruning.bank import FORMAT, WeightBank, check_fingerprint, fingerprint
from diffes.pruning.build import build_bank
from diffes.pruning.calibration import load_calibration
from diffes.spaces.schedule import Schedule, Stages


def consumer(bank: WeightBank, key: tuple[int, int], name: str) -> torch.Tensor:
    """The compensated weight of a group set at a stage and level."""
    (found,) = bank[key][name].consumers
    assert found is not None
    return found


def test_save_and_load_keep_every_bit(tiny: ModelAdapter, stages: Stages, tmp_path: Path) -> None:
    bank = small_bank(tiny, "obs", stages).for_schedule(Schedule(stages, (0, 1, 2, 4), 4))
    bank.save(tmp_path / "bank.safetensors", {"method": "obs"})
    loaded, header = WeightBank.open(tmp_path / "bank.safetensors")
    assert header.pop("same") == {}
    assert header == {"format_version": 3, "kind": "width", "method": "obs"}
    bank.save(tmp_path / "again.safetensors", {"method": "obs"})
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "bank.safetensors").read_bytes()
    assert sorted(loaded) == sorted(bank) == [(1, 1), (2, 2), (3, 4)]
    assert loaded.nbytes == 0  # nothing is read before it is asked for
    assert loaded[2, 2] is loaded[2, 2]  # and nothing twice
    assert loaded.nbytes == sum(weights.nbytes for weights in loaded[2, 2].values())
    for key in bank:
        for name, weights in bank[key].items():
            assert torch.equal(loaded[key][name].kept, weights.kept)
            assert torch.equal(consumer(loaded, key, name), consumer(bank, key, name))


def test_what_entries_share_is_written_once(tiny: ModelAdapter, stages: Stages, tmp_path: Path) -> None:
    """Magnitude has the same order in all stages; sets stay at a rung over some levels."""
    bank = small_bank(tiny, "magnitude", stages)
    bank.save(tmp_path / "bank", {})
    loaded, header = WeightBank.open(tmp_path / "bank")
    distinct = {id(weights) for entry in bank.values() for weights in entry.values()}
    places = {f"stage{s}.level{k}.{name}" for (s, k), entry in bank.items() for name in entry}
    with safe_open(tmp_path / "bank", framework="pt") as file:
        assert len(file.keys()) == len(distinct) == len(places) - len(header["same"]) < len(places)
    assert {key: set(entry) for key, entry in loaded.items()} == {key: set(entry) for key, entry in bank.items()}
    for key, entry in bank.items():
        assert all(torch.equal(loaded[key][name].kept, weights.kept) for name, weights in entry.items())
    assert loaded.nbytes == bank.nbytes
    loaded.save(tmp_path / "again", {"same": None})  # what was shared is shared again
    assert len(WeightBank.open(tmp_path / "again")[1]["same"]) == len(header["same"])


def test_files_of_the_version_before_are_read(tiny: ModelAdapter, stages: Stages, tmp_path: Path) -> None:
    """Version 2: every entry with tensors of its own, and no `same`."""
    bank = small_bank(tiny, "obs", stages)
    tensors = {}
    for (stage, level), entry in bank.items():
        for name, weights in entry.items():
            tensors[f"stage{stage}.level{level}.{name}:kept"] = weights.kept.clone()
            tensors[f"stage{stage}.level{level}.{name}:consumer"] = consumer(bank, (stage, level), name).clone()
    save_file(tensors, tmp_path / "old", metadata={FORMAT: json.dumps({"format_version": 2, "kind": "width"})})
    loaded, header = WeightBank.open(tmp_path / "old")
    loaded.save(tmp_path / "new", header)
    assert WeightBank.open(tmp_path / "new")[1]["format_version"] == 3
    assert sorted(loaded) == sorted(bank)
    for key, entry in bank.items():
        assert loaded[key].keys() == entry.keys()
        for name, weights in entry.items():
            assert torch.equal(loaded[key][name].kept, weights.kept)
            assert torch.equal(consumer(loaded, key, name), consumer(bank, key, name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_banks_are_half_as_large(
    tiny_sdxl: ModelAdapter, stages: Stages, tmp_path: Path, dtype: torch.dtype
) -> None:
    bank = small_bank(tiny_sdxl, "obs", stages, allocation="equal").for_schedule(Schedule(stages, (0, 1, 2, 4), 4))
    bank.save(tmp_path / "full", {})
    bank.save(tmp_path / "half", {}, dtype)
    full, half = (WeightBank.open(tmp_path / name)[0] for name in ("full", "half"))
    back, _ = WeightBank.open(tmp_path / "half", torch.float32)
    name = tiny_sdxl.group_sets()[0].name
    assert consumer(half, (2, 2), name).dtype == dtype
    assert consumer(half, (2, 2), name).nbytes * 2 == consumer(full, (2, 2), name).nbytes
    assert (tmp_path / "half").stat().st_size < (tmp_path / "full").stat().st_size
    torch.testing.assert_close(consumer(back, (2, 2), name), consumer(full, (2, 2), name), rtol=1e-2, atol=1e-3)


def test_depth_banks_say_so(untrained: ModelAdapter, stages: Stages, tmp_path: Path) -> None:
    bank = small_bank(untrained, "layer_drop", stages)
    bank.save(tmp_path / "bank.safetensors", {})
    loaded, header = WeightBank.open(tmp_path / "bank.safetensors")
    assert loaded.kind == header["kind"] == "depth"
    assert torch.equal(loaded[3, 1]["blocks"].kept, bank[3, 1]["blocks"].kept)


def test_stages_do_not_depend_on_which_others_are_built(tiny: ModelAdapter, stages: Stages) -> None:
    alone, together = small_bank(tiny, "obs", stages, [2]), small_bank(tiny, "obs", stages)
    for level in range(1, 5):
        assert alone[2, level].keys() == together[2, level].keys()
        for name in alone[2, level]:
            assert torch.equal(consumer(alone, (2, level), name), consumer(together, (2, level), name))


def test_stages_share_what_does_not_depend_on_them(tiny: ModelAdapter, stages: Stages) -> None:
    every, one = (small_bank(tiny, "magnitude", stages, only, allocation="equal") for only in (None, [0]))
    assert every.nbytes == one.nbytes


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "text", "foreign", "newer"])
def test_unreadable_banks_are_refused(tiny: ModelAdapter, stages: Stages, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "bank.safetensors"
    small_bank(tiny, "obs", stages, [0]).save(path, {})
    content = path.read_bytes()
    messages = {"missing": "missing", "foreign": "not a diffes bank", "newer": "version 4.*newer diffes"}
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        save_file({"x": torch.zeros(2)}, path)
    elif damage == "newer":
        save_file({"x": torch.zeros(2)}, path, metadata={FORMAT: json.dumps({"format_version": 4, "kind": "width"})})
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


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("obs", "transformer_blocks.1.attn1"), ("wanda", "transformer_blocks.1.attn1"),
        ("activation", "transformer_blocks.1.attn1"), ("layer_drop", "blocks"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_calibration_that_is_not_finite_names_the_layer(
    tiny: ModelAdapter, stages: Stages, method: str, name: str, value: float
) -> None:
    """Weights that are no numbers, and finite ones whose activations overflow when they are squared."""
    data = load_calibration(tiny, Path(tiny.pipe.config._name_or_path) / "calibration.npz", 8)
    attention = tiny.denoiser.transformer_blocks[1].attn1
    attention.to_v.weight.data[0] = value
    attention.to_out[0].weight.data[:, 0] = 1e10  # a block's change overflows where its attention's output is large
    with pytest.raises(DiffesError, match=rf"calibration of {name} at timesteps \[250, 500\] overflowed"):
        build_bank(tiny, METHODS.make(method), stages, data, guidance=2.0, seed=0, only=[1])


def test_weights_alone_need_no_calibration(tiny: ModelAdapter, stages: Stages) -> None:
    assert len(build_bank(tiny, METHODS.make("magnitude"), stages, None, guidance=2.0, seed=0)) == 4 * 4
    with pytest.raises(DiffesError, match="OBS with allocation equal needs calibration data, got none"):
        build_bank(tiny, METHODS.make("obs"), stages, None, guidance=2.0, seed=0)
