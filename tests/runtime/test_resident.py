from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import images, open_adapter, small_bank

import diffes
from diffes.adapters import ModelAdapter, load_pipeline
from diffes.errors import DiffesError
from diffes.runtime import resident
from diffes.runtime.router import Router
from diffes.spaces.schedule import Schedule, Stages


def pointers(adapter: ModelAdapter) -> list[int]:
    return [parameter.data_ptr() for parameter in adapter.denoiser.parameters()]


@pytest.mark.parametrize("method", ["magnitude", "obs"])
def test_what_stays_ready_changes_no_prediction_and_stays_within_its_limit(
    untrained: ModelAdapter, stages: Stages, method: str
) -> None:
    bank = small_bank(untrained, method, stages, [0, 1, 2, 3])
    schedule = Schedule(stages, (1, 2, 0, 3), bank.max_level)
    probes = untrained.make_probes(2, 0)
    found = []
    for limit in (0, 100_000, 10**12):
        router = Router(untrained, bank, resident=limit)
        with router.routed(schedule):
            found.append(untrained.sample(probes, 8, 2.0))
            found.append(untrained.sample(probes, 8, 2.0))
        assert router.resident.nbytes <= limit
        assert (router.resident.nbytes > 0) == (limit > 0)
    assert all(torch.equal(each, found[0]) for each in found)


def test_what_stays_ready_is_not_made_again(untrained: ModelAdapter, stages: Stages) -> None:
    bank = small_bank(untrained, "magnitude", stages, [1, 2])
    router = Router(untrained, bank, resident="all")
    probes = untrained.make_probes(1, 0)
    seen = []
    with router.routed(Schedule(stages, (0, 2, 1, 0), bank.max_level)):
        for timestep in (300, 600, 300):
            untrained.denoise_once(untrained.noise(probes), torch.tensor([timestep]), probes.conditions)
            seen.append(pointers(untrained))
    assert seen[0] == seen[2] != seen[1]


def test_layers_written_to_between_two_schedules_are_cut_anew(untrained: ModelAdapter, stages: Stages) -> None:
    bank = small_bank(untrained, "magnitude", stages, [1, 2])
    router = Router(untrained, bank, resident="all")
    schedule = Schedule(stages, (0, 2, 2, 0), bank.max_level)
    probes = untrained.make_probes(2, 0)
    with router.routed(schedule):
        before = untrained.sample(probes, 4, 2.0)
    with torch.no_grad():
        untrained.denoiser.get_submodule(untrained.group_sets()[0].producers[0]).weight.mul_(2)
    with router.routed(schedule):
        after = untrained.sample(probes, 4, 2.0)
    with Router(untrained, bank, resident="stream").routed(schedule):
        assert torch.equal(untrained.sample(probes, 4, 2.0), after)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("mode", ["all", "stream"])
def test_apply_takes_the_mode(any_run: Path, tiny_model: Path, mode: str) -> None:
    pipe = diffes.apply(load_pipeline(str(tiny_model), device="cpu"), any_run)
    expected = images(pipe)
    diffes.apply(pipe, any_run, resident=mode)
    assert (images(pipe) == expected).all()
    with pytest.raises(DiffesError, match="resident must be one of auto, all, stream, got 'some'"):
        diffes.apply(pipe, any_run, resident="some")
    assert (images(pipe) == expected).all()


def test_auto_keeps_half_of_what_a_container_has_left(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = open_adapter(str(tiny_folder)).device
    monkeypatch.setattr(resident, "CGROUP", tmp_path)
    plenty = resident.limit_of("auto", device)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert resident.limit_of("auto", device) == 1_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert plenty is not None and plenty > 1_000_000
    assert resident.limit_of("auto", device) != 1_000_000
    assert (resident.limit_of("all", device), resident.limit_of("stream", device)) == (None, 0)
