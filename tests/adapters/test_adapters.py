from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffes.adapters import ModelAdapter, Probes, adapter_for, load_pipeline, shipped_models
from diffes.errors import DiffesError
from diffes.files import SHIPPED

SCHEDULERS = [
    DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler,
]  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_own_sampling_loop_equals_the_pipeline_with_all_samplers(
    untrained: ModelAdapter, guidance: float, scheduler: Any
) -> None:
    untrained.pipe.scheduler = scheduler.from_config(untrained.pipe.scheduler.config)
    check_sampling_loop(untrained, guidance)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_own_sampling_loop_equals_the_pipeline(adapter: ModelAdapter, guidance: float) -> None:
    check_sampling_loop(adapter, guidance)


def check_sampling_loop(adapter: ModelAdapter, guidance: float) -> None:
    probes = Probes((7, 8, 9), tuple(adapter.choices("heldout")[:3]))
    ours = adapter.decode(adapter.sample(probes, 6, guidance))
    pipe: Any = adapter.pipe
    own = "class_labels" if isinstance(pipe, DiTPipeline) else "prompt"
    made = pipe(
        **{own: list(probes.conditions)}, guidance_scale=guidance, num_inference_steps=6, output_type="np",
        generator=[torch.Generator().manual_seed(seed) for seed in probes.seeds],
    ).images  # fmt: skip
    theirs = torch.from_numpy(made).permute(0, 3, 1, 2)
    assert torch.equal(ours, theirs)


def test_group_sets_cover_every_block(adapter: ModelAdapter) -> None:
    everything = adapter.group_sets()
    sets = [groups for groups in everything if groups.norm is None]
    per_block = 2 if type(adapter.pipe).__name__ == "DiTPipeline" else 3  # a U-Net's blocks have cross-attention
    assert len(sets) == per_block * len(adapter.blocks())
    for groups in sets:
        consumer = adapter.denoiser.get_submodule(groups.consumers[0])
        assert consumer.in_features == groups.n_groups * groups.size
        for producer in groups.producers:
            halves = 2 if "ff" in producer and per_block == 3 else 1  # GEGLU: values over gates
            assert adapter.denoiser.get_submodule(producer).out_features == halves * consumer.in_features
    for groups in everything[len(sets) :]:  # channels of ResNet blocks
        first, *_, norm = (adapter.denoiser.get_submodule(path) for path in groups.producers)
        consumer = adapter.denoiser.get_submodule(groups.consumers[0])
        assert first.out_channels == norm.num_channels == consumer.in_channels == groups.n_groups * groups.size
    resnets = [m for m in adapter.denoiser.modules() if type(m).__name__ == "ResnetBlock2D"]
    assert len(everything) == len(sets) + len(resnets)
    assert max(groups.n_groups for groups in sets if groups.attention is not None) == adapter.max_level("width")
    assert adapter.max_level("depth") == len(adapter.blocks())


def test_blocks_are_in_the_order_of_the_forward_pass(adapter: ModelAdapter) -> None:
    seen = []
    for path in adapter.blocks():
        adapter.denoiser.get_submodule(path).register_forward_hook(lambda *_, path=path: seen.append(path))
    probes = adapter.make_probes(1, 0)
    with torch.no_grad():
        adapter.denoise_once(adapter.noise(probes), torch.tensor([500]), probes.conditions)
    assert seen == adapter.blocks()


def test_probe_i_depends_on_seed_and_i_alone(adapter: ModelAdapter) -> None:
    few, many, other = adapter.make_probes(5, 1), adapter.make_probes(12, 1), adapter.make_probes(5, 2)
    assert few.seeds == many.seeds[:5] and few.conditions == many.conditions[:5]
    assert not set(few.seeds) & set(other.seeds)
    assert torch.equal(adapter.noise(few), adapter.noise(many)[:5])
    assert set(many.conditions) <= set(adapter.choices("search"))


def test_conditions_are_balanced(adapter: ModelAdapter) -> None:
    choices = adapter.choices("heldout")
    counts = Counter(adapter.make_probes(2 * len(choices), 0, "heldout").conditions)
    assert counts == dict.fromkeys(choices, 2)


def test_conditions_of_the_other_family_are_refused(tiny: ModelAdapter, tiny_sdxl: ModelAdapter) -> None:
    options: dict[str, Any] = {"n_steps": 1, "guidance": 1.0, "generator": torch.Generator()}
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


def of_kind(adapter: ModelAdapter, prediction_type: str) -> DDPMScheduler:
    """Makes the pipeline's scheduler one of that kind; diffusers' own forward process of the same schedule."""
    scheduler: Any = type(adapter.pipe.scheduler)
    adapter.pipe.scheduler = scheduler.from_config(adapter.pipe.scheduler.config, prediction_type=prediction_type)
    return DDPMScheduler.from_config(adapter.pipe.scheduler.config)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_target_is_what_the_scheduler_says(untrained: ModelAdapter, kind: str) -> None:
    """The oracle is diffusers' own velocity."""
    process = of_kind(untrained, kind)
    latents, noise = (torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    timesteps = torch.tensor([1, 500, 990])
    expected = {
        "epsilon": noise, "sample": latents, "v_prediction": process.get_velocity(latents, noise, timesteps)
    }  # fmt: skip
    torch.testing.assert_close(untrained.target(latents, noise, timesteps), expected[kind])


def test_other_targets_are_refused(untrained: ModelAdapter) -> None:
    of_kind(untrained, "epsilon")
    untrained.pipe.scheduler.register_to_config(prediction_type="x")
    latents = torch.zeros(1, 4, 4, 4)
    with pytest.raises(DiffesError, match="must be one of epsilon, v_prediction, sample, flow_prediction, got 'x'"):
        untrained.target(latents, latents, torch.tensor([5]))


def test_log_snr_is_that_of_the_noise_schedule_and_falls(adapter: ModelAdapter) -> None:
    alphas = DDPMScheduler.from_config(adapter.pipe.scheduler.config).alphas_cumprod
    found = [adapter.log_snr(timestep) for timestep in (0, 125, 500, 999)]
    assert found == pytest.approx([math.log(alphas[t] / (1 - alphas[t])) for t in (0, 125, 500, 999)], rel=1e-4)
    assert found == sorted(found, reverse=True) and found[0] > 0 > found[-1]
