"""Group sets with several consumers: FFNs of the untrained DiT whose output projection is split into two."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from masking import assert_dense, masked, state
from torch import Tensor, nn

from diffes.adapters import GroupSet, ModelAdapter
from diffes.adapters.dit import DiTAdapter
from diffes.pruning import METHODS
from diffes.pruning.bank import WeightBank, check_bank
from diffes.pruning.build import build_bank
from diffes.pruning.calibration import load_calibration
from diffes.pruning.stage_file import read_stage, write_stage
from diffes.runtime.router import Router
from diffes.spaces.schedule import Schedule, Stages

WIDTH = [name for name in METHODS.names() if METHODS.get(name).kind == "width"]


class SplitFeedForward(nn.Module):
    """An FFN whose output is the sum of two projections of the same channels."""

    def __init__(self, ffn: Any) -> None:
        super().__init__()
        self.net = ffn.net
        last = ffn.net[2]
        self.other = nn.Linear(last.in_features, last.out_features, bias=False)
        self.other.weight.data = torch.randn(last.weight.shape, generator=torch.Generator().manual_seed(1)) / 8

    def forward(self, hidden_states: Tensor) -> Tensor:
        channels = self.net[1](self.net[0](hidden_states))
        return self.net[2](channels) + self.other(channels)


class SplitAdapter(DiTAdapter):
    """Adapter for a DiT with split FFNs."""

    def group_sets(self) -> list[GroupSet]:
        return [
            groups if groups.attention else replace(groups, consumers=(*groups.consumers, f"{groups.name}.other"))
            for groups in super().group_sets()
        ]


@pytest.fixture
def split(tiny: ModelAdapter) -> SplitAdapter:
    for block in tiny.denoiser.transformer_blocks:
        block.ff = SplitFeedForward(block.ff)
    return SplitAdapter(tiny.pipe)


def bank_of(adapter: ModelAdapter, method: str, stages: Stages, folder: Path, allocation: str) -> WeightBank:
    data = load_calibration(adapter, folder / "calibration.npz", 8)
    made = METHODS.make(method)
    return build_bank(adapter, made, stages, data, guidance=2.0, seed=0, allocation=allocation, only=[1])


@pytest.mark.parametrize("resident", ["all", "stream"])
@pytest.mark.parametrize("method", WIDTH)
def test_all_consumers_of_a_set_lose_the_same_groups(
    split: SplitAdapter, tiny_folder: Path, stages: Stages, method: str, resident: str
) -> None:
    bank = bank_of(split, method, stages, tiny_folder, "sensitivity")
    router, probes, before = Router(split, bank, resident=resident), split.make_probes(2, 0), state(split)
    timesteps = torch.tensor([300, 300])
    for level in range(1, bank.max_level + 1):
        with torch.no_grad(), router.routed(Schedule(stages, (0, level, 0, 0), bank.max_level)):
            sliced = split.denoise_once(split.noise(probes), timesteps, probes.conditions)
        with torch.no_grad(), ExitStack() as stack:
            masked(split, bank, level, stack)
            expected = split.denoise_once(split.noise(probes), timesteps, probes.conditions)
        torch.testing.assert_close(sliced, expected, rtol=1e-4, atol=1e-4)
    assert_dense(split, before)


@pytest.mark.parametrize("method", WIDTH)
def test_files_keep_all_consumers(
    split: SplitAdapter, tiny_folder: Path, stages: Stages, method: str, tmp_path: Path
) -> None:
    bank = bank_of(split, method, stages, tiny_folder, "equal")
    bank.save(tmp_path / "bank", {})
    write_stage(tmp_path / "stage1.json", bank, split)
    loaded, header = WeightBank.open(tmp_path / "bank")
    check_bank(loaded, header, split, tmp_path / "bank")
    name = split.group_sets()[1].name
    assert len(bank[1, 2][name].consumers) == (2 if method == "obs" else 0)
    for other in (loaded, read_stage(tmp_path / "stage1.json", split)):
        for key, entry in bank.items():
            assert entry.keys() == other[key].keys()
            for name, weights in entry.items():
                assert torch.equal(weights.kept, other[key][name].kept)
                pairs = zip(weights.consumers, other[key][name].consumers, strict=True)
                assert all(torch.equal(one, same) for one, same in pairs)
