"""Small real pipelines: untrained ones of diffusers' own classes, and the trained ones that ship with the package."""

from __future__ import annotations

import json
import os
import string
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on tiny models, threads only wait for each other

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffes.adapters import ModelAdapter, adapter_for, load_pipeline, shipped_models
from diffes.bank import WeightBank
from diffes.pruning import METHODS
from diffes.pruning.calibration import load_calibration
from diffes.schedule import StagePlan

N_STAGES = 4


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 8, 8), latent_channels=4,
        norm_num_groups=4, sample_size=16,
    )  # fmt: skip


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
        vae = tiny_vae()
    DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {str(i): f"thing {i}" for i in range(6)}
    (folder / "model_index.json").write_text(json.dumps(index))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 3, 16, 16), dtype=np.uint8)
    np.savez(folder / "calibration.npz", images=images, labels=np.arange(24) % 6)
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained SDXL pipeline with blocks of 2 and of 4 heads, prompts and calibration images."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], pad_token="<|endoftext|>", model_max_length=12)
    text = CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, projection_dim=8, bos_token_id=len(vocab) - 2, eos_token_id=len(vocab) - 1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(8, 16, 32),
            layers_per_block=1, transformer_layers_per_block=[1, 1, 2], attention_head_dim=[1, 2, 4],
            cross_attention_dim=16, use_linear_projection=True, norm_num_groups=4, addition_embed_type="text_time",
            addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 8,
        )  # fmt: skip
        pipe = StableDiffusionXLPipeline(
            tiny_vae(), CLIPTextModel(text), CLIPTextModelWithProjection(text), tokenizer, tokenizer, unet,
            EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading"), add_watermarker=False,
        )  # fmt: skip
    pipe.save_pretrained(folder)
    prompts = {split: [f"{split[0]} {letter}" for letter in "abcdef"] for split in ("search", "heldout", "calibration")}
    (folder / "prompts.json").write_text(json.dumps(prompts))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 3, 16, 16), dtype=np.uint8)
    np.savez(folder / "calibration.npz", images=images, prompts=np.array(prompts["calibration"] * 4))
    return folder


def open_adapter(model: str) -> ModelAdapter:
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    return adapter_for(pipe)


@pytest.fixture(params=["tiny-dit", "tiny-sdxl", *shipped_models()])
def model(request: pytest.FixtureRequest) -> str:
    """A folder or name of each small pipeline: an untrained one of each family, and all that ship."""
    fixtures = {"tiny-dit": "tiny_folder", "tiny-sdxl": "tiny_sdxl_folder"}
    return str(request.getfixturevalue(fixtures[request.param])) if request.param in fixtures else request.param


@pytest.fixture
def adapter(model: str) -> ModelAdapter:
    """A fresh adapter of each small pipeline, dense."""
    return open_adapter(model)


@pytest.fixture(params=["tiny_folder", "tiny_sdxl_folder"])
def untrained(request: pytest.FixtureRequest) -> ModelAdapter:
    """A fresh adapter of an untrained pipeline of each family."""
    return open_adapter(str(request.getfixturevalue(request.param)))


@pytest.fixture
def tiny(tiny_folder: Path) -> ModelAdapter:
    """A fresh adapter of the untrained DiT."""
    return open_adapter(str(tiny_folder))


@pytest.fixture
def tiny_sdxl(tiny_sdxl_folder: Path) -> ModelAdapter:
    """A fresh adapter of the untrained SDXL."""
    return open_adapter(str(tiny_sdxl_folder))


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
        _BANKS[key] = WeightBank.build(adapter, METHODS.make(method), plan, data, guided=True, seed=0, stages=stages)
    return _BANKS[key]
