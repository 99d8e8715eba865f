from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from peft import LoraConfig

from diffes.adapters import BlockSet, Condition, ModelAdapter
from diffes.errors import DiffesError
from diffes.pruning.calibration import (
    CalibrationSet,
    StagePass,
    block_changes,
    input_moments,
    load_calibration,
    sample_calibration,
)


def moments(
    adapter: ModelAdapter, data: CalibrationSet, stage: tuple[int, int], full: bool = True, **options: Any
) -> dict[str, torch.Tensor]:
    run = StagePass(adapter, stage, data, **{"guided": True, "seed": 0, **options})
    return {name: found for name, (found,) in input_moments(run, adapter.group_sets(), full=full).items()}


@pytest.fixture
def data(untrained: ModelAdapter) -> CalibrationSet:
    return load_calibration(untrained, Path(untrained.pipe.config._name_or_path) / "calibration.npz", 20)


def test_moments_are_those_of_the_inputs(untrained: ModelAdapter, data: CalibrationSet) -> None:
    for groups in untrained.group_sets():
        seen: list[torch.Tensor] = []
        layer = untrained.denoiser.get_submodule(groups.consumers[0])
        last = 1 if isinstance(layer, torch.nn.Conv2d) else -1
        hook = layer.register_forward_pre_hook(
            lambda _, inputs, seen=seen, last=last: seen.append(inputs[0].movedim(last, -1).flatten(0, -2))
        )
        found = moments(untrained, data, (250, 500))[groups.name]
        squares = moments(untrained, data, (250, 500), full=False)[groups.name]
        hook.remove()
        x = torch.cat(seen[: len(seen) // 2])
        torch.testing.assert_close(found, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(squares, x.square().mean(0), rtol=1e-4, atol=1e-6)


def test_moments_of_a_convolution_with_a_lora_are_those_of_its_channels(tiny_sdxl: ModelAdapter) -> None:
    """A new LoRA adds nothing."""
    noise = CalibrationSet(
        tiny_sdxl.noise(tiny_sdxl.make_probes(4, 0)), tiny_sdxl.make_probes(4, 0).conditions, "noise"
    )
    expected = moments(tiny_sdxl, noise, (250, 500))
    tiny_sdxl.pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["conv1", "conv2", "to_out.0"]))
    found = moments(tiny_sdxl, noise, (250, 500))
    assert expected.keys() == found.keys()
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each)


def test_samples_count_by_their_weight(untrained: ModelAdapter, data: CalibrationSet) -> None:
    """With all the weight on one half of the stage, the moments are those of that half."""
    name = untrained.group_sets()[0].name

    def early(progress: torch.Tensor) -> torch.Tensor:
        return torch.where(progress <= 0.5, 1.0, 1e-9)

    seen, kept = [], []
    layer = untrained.denoiser.get_submodule(untrained.group_sets()[0].consumers[0])
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    def remember(progress: torch.Tensor) -> torch.Tensor:
        kept.append(progress <= 0.5)
        return early(progress)

    found = moments(untrained, data, (0, 1000), weigh=remember)[name]
    hook.remove()
    x = torch.cat(seen)[torch.cat(kept)].flatten(0, 1)
    assert 0 < torch.cat(kept).sum() < len(data)
    torch.testing.assert_close(found, x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_block_changes_are_those_of_the_blocks(untrained: ModelAdapter, data: CalibrationSet) -> None:
    blocks = BlockSet(tuple(untrained.blocks()))
    run = StagePass(untrained, (500, 750), data, guided=True, seed=0)
    changes = block_changes(run, blocks)
    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {path: [] for path in blocks.blocks}
    for path in blocks.blocks:
        block = untrained.denoiser.get_submodule(path)
        block.register_forward_hook(lambda _m, args, out, path=path: pairs[path].append((args[0], out)))
    for _ in run.run():
        pass
    for i, path in enumerate(blocks.blocks):
        before, after = (torch.cat(tensors).flatten(0, 1).double() for tensors in zip(*pairs[path], strict=True))
        cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        assert float(changes.cosine_distance[i]) == pytest.approx(float((1 - cosine).mean()), rel=1e-3)
        assert float(changes.squared_error[i]) == pytest.approx(float((before - after).square().mean()), rel=1e-3)


def test_stage_and_guidance_change_what_is_seen_and_the_seed_decides(
    untrained: ModelAdapter, data: CalibrationSet
) -> None:
    name = untrained.group_sets()[0].name
    base = moments(untrained, data, (0, 250))[name]
    assert torch.equal(base, moments(untrained, data, (0, 250))[name])
    assert not torch.equal(base, moments(untrained, data, (750, 1000))[name])
    assert not torch.equal(base, moments(untrained, data, (0, 250), guided=False)[name])
    assert not torch.equal(base, moments(untrained, data, (0, 250), seed=1)[name])


def test_hooks_are_gone_afterwards(untrained: ModelAdapter, data: CalibrationSet) -> None:
    moments(untrained, data, (0, 250))
    block_changes(StagePass(untrained, (0, 250), data, guided=True, seed=0), BlockSet(tuple(untrained.blocks())))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in untrained.denoiser.modules())


def test_noise_is_added_as_the_schedulers_do(untrained: ModelAdapter) -> None:
    """DDIM, which counts in timesteps, adds the same noise; Euler's, divided by sqrt(sigma^2 + 1), is the same."""
    latents, noise = (torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    timesteps = torch.tensor([1, 500, 999])
    ours = untrained.add_noise(latents, noise, timesteps)
    config = untrained.pipe.scheduler.config
    theirs = DDIMScheduler.from_config(config).add_noise(latents, noise, timesteps)
    torch.testing.assert_close(ours, theirs)
    euler = EulerDiscreteScheduler.from_config(config, timestep_spacing="linspace")
    euler.set_timesteps(1000)
    noisy = euler.add_noise(latents, noise, timesteps.float())
    sigma = euler.sigmas.flip(0)[timesteps + 1].view(-1, 1, 1, 1)
    torch.testing.assert_close(ours, noisy / (sigma**2 + 1).sqrt(), rtol=1e-4, atol=1e-5)


def test_a_model_without_images_is_calibrated_on_its_own_samples(untrained: ModelAdapter) -> None:
    data = sample_calibration(untrained, 6, n_steps=3, guidance=2.0, seed=0, batch=4)
    assert data.latents.shape == (6, 4, 4, 4) and len(data.conditions) == 6


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_damaged_calibration_files_are_refused(tiny: ModelAdapter, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "images.npz"
    if content is None:
        np.savez(path, images=np.zeros((4, 3, 16, 16), np.float32), labels=np.zeros(4))
    else:
        path.write_bytes(content)
    with pytest.raises(DiffesError, match="expected an"):
        load_calibration(tiny, path, 4)


@pytest.mark.parametrize(("guided", "expected"), [(True, 0.5), (False, 0.0)])
def test_half_of_the_rows_are_without_condition_where_sampling_is_guided(
    untrained: ModelAdapter, data: CalibrationSet, monkeypatch: pytest.MonkeyPatch, guided: bool, expected: float
) -> None:
    many = CalibrationSet(data.latents.repeat(50, 1, 1, 1), data.conditions * 50, "repeated")
    seen: list[Condition] = []

    def denoise_once(latents: torch.Tensor, timesteps: torch.Tensor, conditions: Sequence[Condition]) -> torch.Tensor:
        assert len(latents) == len(timesteps) == len(conditions)
        seen.extend(conditions)
        return latents

    monkeypatch.setattr(untrained, "denoise_once", denoise_once)
    for _ in StagePass(untrained, (250, 500), many, guided, seed=0).run():
        pass
    assert len(seen) == 1000
    assert sum(condition is None for condition in seen) / 1000 == pytest.approx(expected, abs=0.05)
    assert all(one in (None, other) for one, other in zip(seen, many.conditions, strict=True))
