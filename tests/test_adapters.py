from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffes.adapters import SHIPPED, ModelAdapter, Probes, adapter_for, load_pipeline, shipped_models
from diffes.errors import DiffesError
from diffes.prompts import default_prompts

SCHEDULERS = [
    DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler,
]  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_own_sampling_loop_equals_the_pipeline_with_all_samplers(
    untrained: ModelAdapter, guidance: float, scheduler: type
) -> None:
    untrained.pipe.scheduler = scheduler.from_config(untrained.pipe.scheduler.config)
    check_sampling_loop(untrained, guidance)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_own_sampling_loop_equals_the_pipeline(adapter: ModelAdapter, guidance: float) -> None:
    check_sampling_loop(adapter, guidance)


def check_sampling_loop(adapter: ModelAdapter, guidance: float) -> None:
    config = adapter.denoiser.config
    shape = (3, config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    conditions = tuple(adapter.choices("heldout")[:3])
    ours = adapter.decode(adapter.sample(Probes(noise, conditions), 6, guidance))
    theirs = adapter.generate(conditions, n_steps=6, guidance=guidance, generator=torch.Generator().manual_seed(7))
    assert torch.equal(ours, theirs)


def test_group_sets_cover_every_block(adapter: ModelAdapter) -> None:
    sets = adapter.group_sets()
    per_block = 2 if adapter.pipeline_class == "DiTPipeline" else 3  # a U-Net's blocks have cross-attention
    assert len(sets) == per_block * len(adapter.blocks())
    for groups in sets:
        consumer = adapter.denoiser.get_submodule(groups.consumer)
        assert consumer.in_features == groups.n_groups * groups.size
        for producer in groups.producers:
            halves = 2 if "ff" in producer and per_block == 3 else 1  # GEGLU: values over gates
            assert adapter.denoiser.get_submodule(producer).out_features == halves * consumer.in_features
    assert max(groups.n_groups for groups in sets if groups.kind == "heads") == adapter.max_level("width")
    assert adapter.max_level("depth") == len(adapter.blocks())


def test_blocks_are_in_the_order_of_the_forward_pass(adapter: ModelAdapter) -> None:
    seen = []
    for path in adapter.blocks():
        adapter.denoiser.get_submodule(path).register_forward_hook(lambda *_, path=path: seen.append(path))
    probes = adapter.make_probes(1, 0)
    with torch.no_grad():
        adapter.denoise_once(probes.noise, torch.tensor([500]), probes.conditions)
    assert seen == adapter.blocks()


def test_probe_i_depends_on_seed_and_i_alone(adapter: ModelAdapter) -> None:
    few, many, other = adapter.make_probes(5, 1), adapter.make_probes(12, 1), adapter.make_probes(5, 2)
    assert torch.equal(few.noise, many.noise[:5]) and few.conditions == many.conditions[:5]
    assert not torch.equal(few.noise, other.noise)
    assert set(many.conditions) <= set(adapter.choices("search"))


def test_conditions_are_balanced(adapter: ModelAdapter) -> None:
    choices = adapter.choices("heldout")
    counts = Counter(adapter.make_probes(2 * len(choices), 0, "heldout").conditions)
    assert counts == dict.fromkeys(choices, 2)


def test_prompts_of_searches_reports_and_calibration_are_disjoint() -> None:
    for prompts in (adapter_for(load_pipeline("emoji-sdxl")).prompts, default_prompts()):
        with np.load(SHIPPED / "emoji-sdxl" / "calibration.npz") as data:
            calibration = set(prompts["calibration"]) | set(data["prompts"].tolist())
        search, heldout = set(prompts["search"]), set(prompts["heldout"])
        assert len(search) >= 64 and len(heldout) >= 64
        assert not search & heldout and not search & calibration and not heldout & calibration


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ("[]", "holds no prompts"),
        ('{"search": ["a"]}', "at least one"),
        ('{"search": ["a", ""], "heldout": ["b"]}', "not empty"),
        ('{"search": ["a"], "heldout": ["b", "a"]}', "'a' in both 'search' and 'heldout'"),
    ],
)
def test_unusable_prompts_are_refused(tiny_sdxl: ModelAdapter, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(content)
    with pytest.raises(DiffesError, match=message):
        tiny_sdxl.use_prompts(path)


def test_conditions_of_the_other_family_are_refused(tiny: ModelAdapter, tiny_sdxl: ModelAdapter) -> None:
    options = {"n_steps": 1, "guidance": 1.0, "generator": torch.Generator()}
    with pytest.raises(DiffesError, match=r"takes prompts.*got 3"):
        tiny_sdxl.generate([3], **options)
    with pytest.raises(DiffesError, match=r"classes must be in .* got 'a cat'"):
        tiny.generate(["a cat"], **options)
    with pytest.raises(DiffesError, match="takes class ids"):
        tiny.use_prompts(Path("prompts.json"))


@pytest.mark.parametrize("name", shipped_models())
def test_encode_undoes_decode_on_the_shipped_pipelines(name: str) -> None:
    adapter = adapter_for(load_pipeline(name))
    with np.load(SHIPPED / name / "calibration.npz") as data:
        images = torch.from_numpy(data["images"][:32]).float() / 255
    assert (adapter.decode(adapter.encode(images)) - images).abs().mean() < 0.05


def test_shipped_pipelines_are_small_and_ready() -> None:
    assert shipped_models() == ["emoji-sdxl", "fashion-dit"]
    assert load_pipeline("fashion-dit").labels["Trouser"] == 1
    for name in shipped_models():
        assert not adapter_for(load_pipeline(name)).denoiser.training
        assert sum(path.stat().st_size for path in (SHIPPED / name).rglob("*.safetensors")) <= 16 * 2**20


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("fashion-dti", "fashion-dit"),
        ("/no/such/folder", "unknown model"),
        ("EMPTY", "no model_index.json"),
        ("DAMAGED", "could not be loaded"),
    ],
)
def test_unusable_models_are_refused(model: str, message: str, tmp_path: Path, tiny_folder: Path) -> None:
    if model == "EMPTY":
        model = str(tmp_path)
    elif model == "DAMAGED":
        for path in tiny_folder.rglob("*"):
            target = tmp_path / path.relative_to(tiny_folder)
            if path.is_dir():
                target.mkdir()
            else:
                content = path.read_bytes()
                target.write_bytes(content[: len(content) // 2] if path.suffix == ".safetensors" else content)
        model = str(tmp_path)
    with pytest.raises(DiffesError, match=message):
        load_pipeline(model)
