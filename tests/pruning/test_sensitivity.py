from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch

from diffes.adapters import GroupSet, ModelAdapter
from diffes.adapters.convolutions import as_matrix
from diffes.errors import DiffesError
from diffes.pruning import GroupWeights, sensitivity
from diffes.pruning.allocation import Rungs
from diffes.pruning.calibration import CalibrationSet, load_calibration
from diffes.pruning.sensitivity import StageSensitivity

SMALL = 1e-3  # a change that a model answers in proportion


def calibration(adapter: ModelAdapter, n: int) -> CalibrationSet:
    return load_calibration(adapter, Path(adapter.pipe.config._name_or_path) / "calibration.npz", n)


def a_little_smaller(adapter: ModelAdapter, groups: GroupSet, factor: float) -> list[GroupWeights]:
    """Dense, and with all of the consumer's weights a little smaller."""
    weight = as_matrix(adapter.denoiser.get_submodule(groups.consumers[0]).weight.detach())
    everything = torch.arange(groups.n_groups, dtype=torch.int32)
    return [GroupWeights(everything), GroupWeights(everything, (weight * (1 - factor),))]


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sensitivity_is_the_squared_change_of_the_guided_prediction(
    untrained: ModelAdapter, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against denoiser calls with one layer changed a little, on the very samples, in many directions."""
    monkeypatch.setattr(sensitivity, "DIRECTIONS", 300)
    adapter, n, stage, seed = untrained, 4, (250, 500), 3
    data = calibration(adapter, 8)
    monkeypatch.setattr(sensitivity, "SAMPLES", n)
    sets = [Rungs(groups, 1, (groups.n_groups, groups.n_groups), 1.0) for groups in adapter.group_sets()]
    pruned = {g.name: a_little_smaller(adapter, g, SMALL) for g in adapter.group_sets()}
    found = StageSensitivity(adapter, stage, data, guidance, seed).measure(sets, pruned)

    generator = torch.Generator().manual_seed(seed + sensitivity.OWN_STREAM)
    chosen = torch.randperm(len(data), generator=generator)[:n]
    timesteps = torch.randint(*stage, (n,), generator=generator)
    noise = torch.randn((n, *data.latents.shape[1:]), generator=generator)
    noisy = adapter.add_noise(data.latents[chosen], noise, timesteps)
    conditions = [data.conditions[i] for i in chosen.tolist()]

    @torch.no_grad()
    def predicted() -> torch.Tensor:
        given = adapter.denoise_once(noisy, timesteps, conditions)[:, : noise.shape[1]].double()
        if guidance <= 1:
            return given
        null = adapter.denoise_once(noisy, timesteps, [None] * n)[:, : noise.shape[1]].double()
        return null + guidance * (given - null)

    dense = predicted()
    for groups, found_here in zip(adapter.group_sets(), found, strict=True):
        assert found_here[0] == 0
        layer = adapter.denoiser.get_submodule(groups.consumers[0])
        before = layer.weight.data
        layer.weight.data = before * (1 - 10 * SMALL)  # ten times as much: fp32 resolves it
        expected = float((predicted() - dense).square().mean()) / 100
        layer.weight.data = before
        assert found_here[1] == pytest.approx(expected, rel=0.25), groups.name


def test_dropped_inputs_count_as_zero_weights(tiny: ModelAdapter) -> None:
    """A set without its last group counts as much as one whose last columns are zero."""
    groups = tiny.group_sets()[0]
    weight = tiny.denoiser.get_submodule(groups.consumers[0]).weight.detach().clone()
    weight[:, -groups.size :] = 0
    everything = torch.arange(groups.n_groups, dtype=torch.int32)
    pruned = {groups.name: [GroupWeights(everything[:-1]), GroupWeights(everything, (weight,))]}
    rungs = Rungs(groups, 1, (groups.n_groups - 1, groups.n_groups), 1.0)
    (found,) = StageSensitivity(tiny, (0, 250), calibration(tiny, 8), 2.0, 0).measure([rungs], pruned)
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0] > 0


def test_the_same_seed_measures_the_same_and_leaves_the_model_as_it_was(untrained: ModelAdapter) -> None:
    sets = [Rungs.of(groups, 4, 1.0) for groups in untrained.group_sets()]
    pruned = {
        r.groups.name: [GroupWeights(torch.arange(n, dtype=torch.int32)) for n in r.kept] for r in sets
    }  # without compensation
    data = calibration(untrained, 8)
    state = torch.random.get_rng_state()
    one, other = (StageSensitivity(untrained, (500, 750), data, 2.0, 1).measure(sets, pruned) for _ in range(2))
    assert [a.tolist() for a in one] == [b.tolist() for b in other]
    elsewhere = StageSensitivity(untrained, (500, 750), data, 2.0, 2).measure(sets, pruned)
    assert [a.tolist() for a in one] != [b.tolist() for b in elsewhere]
    assert all((each[1:] > 0).all() for each in one)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_hooks for module in untrained.denoiser.modules())
    assert all(parameter.grad is None for parameter in untrained.denoiser.parameters())


def test_micro_batches_change_nothing(tiny: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [Rungs.of(groups, 4, 1.0) for groups in tiny.group_sets()]
    pruned = {r.groups.name: [GroupWeights(torch.arange(n, dtype=torch.int32)) for n in r.kept] for r in sets}
    run = StageSensitivity(tiny, (500, 750), calibration(tiny, 6), 2.0, 1)
    together = run.measure(sets, pruned)
    monkeypatch.setattr(sensitivity, "ELEMENTS", 1)
    apart = run.measure(sets, pruned)
    for one, other in zip(together, apart, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_calls_count_rows_forwards_and_twice_backwards(tiny: ModelAdapter) -> None:
    data = calibration(tiny, 6)
    assert StageSensitivity(tiny, (0, 250), data, 2.0, 0).calls == 12 * (1 + 2 * sensitivity.DIRECTIONS)
    assert StageSensitivity(tiny, (0, 250), data, 1.0, 0).calls == 6 * (1 + 2 * sensitivity.DIRECTIONS)


def test_gradients_that_overflow_are_refused(tiny: ModelAdapter) -> None:
    data = calibration(tiny, 4)
    tiny.denoiser.proj_out_2.weight.data[:] = 1e38
    sets = [Rungs.of(groups, 4, 1.0) for groups in tiny.group_sets()]
    pruned = {r.groups.name: [GroupWeights(torch.arange(n, dtype=torch.int32)) for n in r.kept] for r in sets}
    with pytest.raises(DiffesError, match=r"timesteps \[0, 250\) is not finite.*--allocation equal"):
        StageSensitivity(tiny, (0, 250), data, 2.0, 0).measure(sets, pruned)


def test_a_device_without_room_computes_activations_again(
    untrained: ModelAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same gradients, for layers and for whole attentions and FFNs, and no other model does."""
    monkeypatch.setattr(sensitivity, "_SPARING", WeakSet())
    measuring = StageSensitivity(untrained, (250, 500), calibration(untrained, 4), 3.0, 3)
    sets = [Rungs(groups, 1, (groups.n_groups, groups.n_groups), 1.0) for groups in untrained.group_sets()]
    pruned = {g.name: a_little_smaller(untrained, g, SMALL) for g in untrained.group_sets()}
    paths = untrained.branches().sources
    wanted, also = measuring.measure(sets, pruned), measuring.of_earlier_outputs(paths)
    observe, asked = StageSensitivity._observe, list[bool]()

    def full(self: StageSensitivity, paths: Any, drawn: Any, backward: bool) -> Any:
        if backward:
            asked.append(untrained.denoiser.is_gradient_checkpointing)
            if not asked[-1]:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return observe(self, paths, drawn, backward)

    monkeypatch.setattr(StageSensitivity, "_observe", full)
    found, reused = measuring.measure(sets, pruned), measuring.of_earlier_outputs(paths)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    torch.testing.assert_close(reused, also, rtol=1e-5, atol=0)
    assert asked[:2] == [False, True] and all(asked[1:]) and len(asked) > 2  # once is enough
    assert not untrained.denoiser.is_gradient_checkpointing
    assert list(sensitivity._SPARING) == [untrained.denoiser]


def test_a_device_without_room_at_all_says_so(tiny: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "_SPARING", WeakSet())

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StageSensitivity, "_observe", full)
    with pytest.raises(DiffesError, match="no room for a single image"):
        StageSensitivity(tiny, (250, 500), calibration(tiny, 4), 3.0, 3).of_earlier_outputs(tiny.branches().sources)
    assert not tiny.denoiser.is_gradient_checkpointing
