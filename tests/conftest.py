"""Small real pipelines: an untrained DiT of diffusers' own classes, and the trained one that ships with the package."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on tiny models, threads only wait for each other

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from diffes.adapters import ModelAdapter, adapter_for, load_pipeline
from diffes.bank import WeightBank
from diffes.pruning import METHODS
from diffes.pruning.calibration import load_calibration
from diffes.schedule import StagePlan

N_STAGES = 4


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained DiT of 2 blocks and 4 heads with calibration images, in diffusers' folder format."""
    folder = tmp_path_factory.mktemp("models") / "tiny-dit"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=8, num_layers=2, in_channels=4, out_channels=8, sample_size=4,
            patch_size=2, num_embeds_ada_norm=1000,
        )  # fmt: skip
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 8, 8), latent_channels=4,
            norm_num_groups=4, sample_size=16,
        )  # fmt: skip
    DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {str(i): f"thing {i}" for i in range(6)}
    (folder / "model_index.json").write_text(json.dumps(index))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 3, 16, 16), dtype=np.uint8)
    np.savez(folder / "calibration.npz", images=images, labels=np.arange(24) % 6)
    return folder


@pytest.fixture(params=["tiny", "shipped"])
def adapter(request: pytest.FixtureRequest, tiny_folder: Path) -> ModelAdapter:
    """A fresh adapter, dense, once of the untrained and once of the shipped pipeline."""
    pipe = load_pipeline(str(tiny_folder) if request.param == "tiny" else "fashion-dit")
    pipe.set_progress_bar_config(disable=True)
    return adapter_for(pipe)


@pytest.fixture
def tiny(tiny_folder: Path) -> ModelAdapter:
    """A fresh adapter of the untrained pipeline."""
    pipe = load_pipeline(str(tiny_folder))
    pipe.set_progress_bar_config(disable=True)
    return adapter_for(pipe)


@pytest.fixture(scope="session")
def plan() -> StagePlan:
    return StagePlan.equal(N_STAGES)


_BANKS: dict[tuple[object, ...], WeightBank] = {}


def build_bank(adapter: ModelAdapter, method: str, plan: StagePlan, stages: list[int] | None = None) -> WeightBank:
    """A bank with a handful of calibration images, enough for everything but quality; built once a session."""
    model = adapter.pipe.config._name_or_path
    key = (model, method, plan, tuple(stages) if stages else None)
    if key not in _BANKS:
        data = load_calibration(adapter, Path(model) / "calibration.npz", 24)
        _BANKS[key] = WeightBank.build(adapter, METHODS.get(method)(), plan, data, guided=True, seed=0, stages=stages)
    return _BANKS[key]
