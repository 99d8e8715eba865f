from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffes.adapters import ModelAdapter
from diffes.errors import DiffesError
from diffes.pruning.calibration import CalibrationSet, load_calibration, sample_calibration, second_moments


def moments(adapter: ModelAdapter, data: CalibrationSet, stage: tuple[int, int], seed: int = 0, **options: object):
    generator = torch.Generator().manual_seed(seed)
    options = {"guided": True, **options}
    return second_moments(adapter, adapter.group_sets(), stage, data, generator=generator, **options)


@pytest.fixture
def data(tiny: ModelAdapter, tiny_folder: Path) -> CalibrationSet:
    return load_calibration(tiny, tiny_folder / "calibration.npz", 20)


def test_second_moments_are_those_of_the_inputs(tiny: ModelAdapter, data: CalibrationSet) -> None:
    name = tiny.group_sets()[1].name
    seen = []
    layer = tiny.denoiser.get_submodule(tiny.group_sets()[1].consumer)
    with_hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    found = moments(tiny, data, (250, 500))[name]
    with_hook.remove()
    x = torch.cat(seen)
    torch.testing.assert_close(found, x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_stage_and_guidance_change_what_is_seen_and_the_seed_decides(tiny: ModelAdapter, data: CalibrationSet) -> None:
    name = tiny.group_sets()[0].name
    base = moments(tiny, data, (0, 250))[name]
    assert torch.equal(base, moments(tiny, data, (0, 250))[name])
    assert not torch.equal(base, moments(tiny, data, (750, 1000))[name])
    assert not torch.equal(base, moments(tiny, data, (0, 250), guided=False)[name])
    assert not torch.equal(base, moments(tiny, data, (0, 250), seed=1)[name])


def test_hooks_are_gone_afterwards(tiny: ModelAdapter, data: CalibrationSet) -> None:
    moments(tiny, data, (0, 250))
    assert not any(module._forward_pre_hooks for module in tiny.denoiser.modules())


def test_a_model_without_images_is_calibrated_on_its_own_samples(tiny: ModelAdapter) -> None:
    data = sample_calibration(tiny, 6, n_steps=3, guidance=2.0, seed=0, batch=4)
    assert data.latents.shape == (6, 4, 4, 4) and len(data.condition) == 6


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_damaged_calibration_files_are_refused(tiny: ModelAdapter, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "images.npz"
    if content is None:
        np.savez(path, images=np.zeros((4, 3, 16, 16), np.float32), labels=np.zeros(4))
    else:
        path.write_bytes(content)
    with pytest.raises(DiffesError, match="expected an"):
        load_calibration(tiny, path, 4)
