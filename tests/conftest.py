"""Small real pipelines: untrained ones of diffusers' own classes, and the trained ones that ship with the package."""

from __future__ import annotations

import copy
import json
import os
import shutil
import string
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if sys.dont_write_bytecode:  # the processes that tests start would each compile torch and diffusers anew: 20 seconds
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": sys.pycache_prefix}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on tiny models, threads only wait for each other

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffes.adapters import ModelAdapter, adapter_for, load_pipeline, shipped_models
from diffes.config import DEFAULTS, Allocation, RunConfig
from diffes.figures import plots
from diffes.problems import plans
from diffes.problems.workbench import Workbench, prepare
from diffes.pruning import make_method
from diffes.pruning.bank import WeightBank
from diffes.pruning.build import build_bank
from diffes.pruning.calibration import load_calibration
from diffes.runtime.router import Router
from diffes.spaces.schedule import Stages
from diffes.study.run import complete_run

LONG = ("workers", "study", "test_cli", "test_notebooks", "runtime", "measure", "solvers", "spaces")  # begun first
N_STAGES = 4
REFERENCE_STEPS = 60
FIT_PROBES = 4
WEIGHT = 16  # of the last layers of untrained blocks, relative to their initialisation


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs what takes long first, so that two workers end together."""
    here = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(here).parts[0].removesuffix(".py")
        return LONG.index(name) if name in LONG else len(LONG)

    items.sort(key=place)
    for item in items:
        if {"pool", "one_pool"} & set(getattr(item, "fixturenames", ())):  # processes of Ray
            item.add_marker(pytest.mark.slow)


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 8, 8), latent_channels=4,
        norm_num_groups=4, sample_size=16,
    )  # fmt: skip


def weighty(denoiser: torch.nn.Module) -> None:
    """Makes the blocks of an untrained denoiser matter: as they are initialised, bf16 hardly sees them pruned."""
    for name, module in denoiser.named_modules():
        if name.endswith(("to_out.0", "ff.net.2", ".proj_out", ".norm1.linear")):
            module.weight.data.mul_(WEIGHT)


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
        weighty(transformer)
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
            layers_per_block=1, transformer_layers_per_block=1, attention_head_dim=[1, 2, 4],
            cross_attention_dim=16, use_linear_projection=True, norm_num_groups=4, addition_embed_type="text_time",
            addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 8,
        )  # fmt: skip
        weighty(unet)
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


_PIPES: dict[str, DiffusionPipeline] = {}


def open_pipe(model: Path | str) -> DiffusionPipeline:
    """A fresh pipeline: each is loaded once a session, and copied."""
    if str(model) not in _PIPES:
        _PIPES[str(model)] = load_pipeline(str(model))
        _PIPES[str(model)].set_progress_bar_config(disable=True)
    return copy.deepcopy(_PIPES[str(model)])


def open_adapter(model: str) -> ModelAdapter:
    return adapter_for(open_pipe(model))


@pytest.fixture(
    params=["tiny-dit", "tiny-sdxl", *(pytest.param(name, marks=pytest.mark.slow) for name in shipped_models())]
)
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
def stages() -> Stages:
    return Stages.equal(N_STAGES)


@pytest.fixture(scope="session", autouse=True)
def quicker() -> Iterator[None]:
    """Dense references of fewer steps and probes than a front has, and figures of fewer pixels: nothing that is
    tested depends on how converged the ones are, or how sharp the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "REFERENCE_STEPS", REFERENCE_STEPS)
        patch.setitem(DEFAULTS, "fit_probes", FIT_PROBES)
        patch.setattr(plots, "DPI", 70)
        yield


_BANKS: dict[tuple[object, ...], WeightBank] = {}


def small_bank(
    adapter: ModelAdapter,
    method: str,
    stages: Stages,
    only: list[int] | None = None,
    allocation: Allocation = "damage",
) -> WeightBank:
    """A bank with a handful of calibration images, enough for everything but quality; built once a session."""
    if "deep_reuse" in method and adapter.up_layers() is None:
        pytest.skip("a transformer has no way up")
    model = adapter.pipe.config._name_or_path
    key = (model, method, stages, tuple(only) if only else None, allocation)
    if key not in _BANKS:
        data = load_calibration(adapter, Path(model) / "calibration.npz", 24)
        _BANKS[key] = build_bank(
            adapter, make_method(method), stages, data, guidance=2.0, seed=0, allocation=allocation, only=only
        )
    return _BANKS[key]


@pytest.fixture
def router(untrained: ModelAdapter, stages: Stages) -> Router:
    """Of an untrained pipeline of each family, with thin weights in stage 1 alone."""
    return Router(untrained, small_bank(untrained, "magnitude", stages, [1]))


@pytest.fixture
def tiny_router(tiny: ModelAdapter, stages: Stages) -> Router:
    """Of the untrained DiT, likewise."""
    return Router(tiny, small_bank(tiny, "magnitude", stages, [1]))


def skip_twice(adapter: ModelAdapter, method: str) -> None:
    """Leaves out all methods on trained models but one of each kind; `tests/runtime/test_reuse.py` has its own."""
    if method not in ("obs", "layer_drop") and Path(adapter.pipe.config._name_or_path).name in shipped_models():
        pytest.skip("on untrained models only")


class Counting:
    """Progress that notes the titles of its tasks."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    def say(self, text: str) -> None:
        self.titles.append(text)

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        self.titles.append(title)
        yield lambda note, amount=1: None


CHEAP: dict[str, Any] = {
    "method": "magnitude", "stages": 4, "steps": 4, "metric": "latent_mse", "probes": 4, "heldout": 4, "max_evals": 6,
    "strategy": "evolution",
}  # fmt: skip


def small_config(model: Path, **changes: Any) -> RunConfig:
    """Settings of the cheapest search of levels that has everything."""
    settings = CHEAP | {"genes": "levels", "cost": "level", "budget": 0.5} | changes
    return RunConfig(model=str(model), **settings).resolved()


def plan_config(model: Path, **changes: Any) -> RunConfig:
    """Settings of the cheapest search of plans that has everything."""
    return RunConfig(model=str(model), **CHEAP | {"genes": "joint", "calls": 3.0, "nodes": 8} | changes).resolved()


def options_of(config: RunConfig) -> list[str]:
    """Settings as a command takes them."""
    given = {name: value for name, value in config.to_json().items() if value not in (None, False)}
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


@pytest.fixture
def base(tiny_folder: Path) -> RunConfig:
    return small_config(tiny_folder)


@pytest.fixture(scope="session")
def bench(tiny_folder: Path) -> Workbench:
    """The untrained DiT, ready to search on; its model is dense between evaluations."""
    return prepare(small_config(tiny_folder), Counting())


@pytest.fixture(scope="session")
def prompted(tiny_sdxl_folder: Path) -> Workbench:
    """The untrained SDXL, ready to search on."""
    return prepare(small_config(tiny_sdxl_folder, heldout=6), Counting())


_RUNS: dict[tuple[str, str], Path] = {}


def make_run(tmp_path_factory: pytest.TempPathFactory, model: Path, method: str) -> Path:
    """A finished run, made once a session."""
    key = (str(model), method)
    if key not in _RUNS:
        out = tmp_path_factory.mktemp("runs") / f"{model.name}-{method}"
        in_macs = {"cost": "macs", "budget": 0.8} if "reuse" in method else {}
        complete_run(small_config(model, method=method, **in_macs), out, Counting())
        _RUNS[key] = out
    return _RUNS[key]


@pytest.fixture
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the untrained DiT."""
    return make_run(tmp_path_factory, tiny_folder, "obs")


@pytest.fixture(params=["tiny_folder", "tiny_sdxl_folder"])
def tiny_model(request: pytest.FixtureRequest) -> Path:
    """The folder of an untrained pipeline of each family."""
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture(params=["obs", "layer_drop", "magnitude+block_reuse"])
def any_run(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind on the untrained pipeline of each family."""
    return make_run(tmp_path_factory, tiny_model, request.param)


def images(pipe: DiffusionPipeline, steps: int = 5, guidance: float = 2.0) -> np.ndarray:
    """Two images (2, height, width, channels) of a pipeline, always from the same noise and conditions."""
    pipe.set_progress_bar_config(disable=True)
    conditions = [0, 3] if isinstance(pipe, DiTPipeline) else ["h a", "h c"]
    options = {"generator": torch.Generator().manual_seed(5), "num_inference_steps": steps, "output_type": "np"}
    made: np.ndarray = pipe(conditions, guidance_scale=guidance, **options).images
    return made


def altered(run: Path, tmp_path: Path, name: str, change: Callable[[Path], object]) -> Path:
    """A copy of a run with one file changed."""
    copy = tmp_path / "altered"
    shutil.copytree(run, copy)
    change(copy / name)
    return copy
