"""What is done to a model before, while and after a schedule is routed through it: right as masked by hand, or refused.

Tests with the mark `feature` are the rows of `benchmarks/results/router_features.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import images, make_run, open_pipe, small_bank
from diffusers import (
    StableDiffusionXLPAGPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    SlicedAttnProcessor,
)
from masking import assert_dense, masked, state
from torch import Tensor, nn

import diffes
from diffes.adapters import ModelAdapter
from diffes.adapters.sdxl import UNetAdapter
from diffes.errors import DiffesError
from diffes.measure.evaluator import ScheduleEvaluator
from diffes.measure.metrics import make_metric
from diffes.runtime.router import Router
from diffes.spaces.schedule import Schedule, Stages

feature = pytest.mark.feature


class Louder(AttnProcessor2_0):  # type: ignore[misc]
    """Somebody's own processor: what attention gives, times 1.5, its bias included."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        louder: Tensor = super().__call__(attn, hidden_states, *args, **kwargs) * 1.5
        return louder


def attentions(adapter: ModelAdapter) -> list[Any]:
    return [adapter.denoiser.get_submodule(g.name) for g in adapter.group_sets() if g.attention is not None]


def set_processors(adapter: ModelAdapter, processor: Any) -> None:
    for attention in attentions(adapter):
        attention.set_processor(processor)


def call(adapter: ModelAdapter, timestep: int = 300) -> Tensor:
    probes = adapter.make_probes(2, 0)
    with torch.no_grad():
        return adapter.denoise_once(adapter.noise(probes), torch.tensor([timestep] * 2), probes.conditions)


def thin(stages: Stages, level: int, max_level: int = 4) -> Schedule:
    """Thin in stage 1 alone, the one of timestep 300."""
    return Schedule(stages, (0, level, 0, 0), max_level)


def check_masked(router: Router, stages: Stages, change: Callable[[ModelAdapter], Any]) -> None:
    """At every level, a routed model that is changed while it is thin equals a masked one that is changed."""
    adapter = router.adapter
    before = [attention.processor for attention in attentions(adapter)]

    def undo() -> None:
        for attention, processor in zip(attentions(adapter), before, strict=True):
            attention.set_processor(processor)

    for level in range(1, router.max_level + 1):
        with router.routed(thin(stages, level)):
            call(adapter)
            change(adapter)
            found = call(adapter)
        after = [attention.processor for attention in attentions(adapter)]
        undo()
        change(adapter)
        assert after == [attention.processor for attention in attentions(adapter)]
        with ExitStack() as stack:
            masked(adapter, router.bank, level, stack)
            expected = call(adapter)
        undo()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


LOUDER, PAG = Louder(), PAGIdentitySelfAttnProcessor2_0()


@feature("attention processors of the user, set before or after `apply`, all levels", "equal")
@pytest.mark.parametrize("processor", [LOUDER, AttnProcessor(), SlicedAttnProcessor(2)])
def test_processors_set_while_routed_are_kept(router: Router, stages: Stages, processor: Any) -> None:
    before = state(router.adapter)
    check_masked(router, stages, lambda adapter: set_processors(adapter, processor))
    assert_dense(router.adapter, before)


@feature("PAG's processors, set and taken away by its pipeline in every run", "equal")
def test_processors_of_perturbed_attention_are_kept(router: Router, stages: Stages) -> None:
    check_masked(router, stages, lambda adapter: attentions(adapter)[0].set_processor(PAG))


@feature("PAG's processors, set and taken away by its pipeline in every run", "equal")
def test_a_pag_pipeline_around_a_routed_model_is_guided(tiny_sdxl: ModelAdapter, stages: Stages) -> None:
    router = Router(tiny_sdxl, small_bank(tiny_sdxl, "magnitude", stages))
    pipe = StableDiffusionXLPAGPipeline.from_pipe(tiny_sdxl.pipe, pag_applied_layers=["down", "mid", "up"])
    for level in (2, 4):
        with router.routed(Schedule(stages, (level,) * 4, 4)):
            call(tiny_sdxl)
            processors = pipe.unet.attn_processors
            pipe.set_progress_bar_config(disable=True)
            options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np"}
            made = [
                pipe("h a", pag_scale=scale, generator=torch.Generator().manual_seed(5), **options).images
                for scale in (0.0, 3.0)
            ]
            assert pipe.unet.attn_processors == processors
        # without a head every layer gives its bias, perturbed or not, and there is nothing that could guide; runs with
        # and without guidance are in batches of different sizes, which round differently
        change = float(np.abs(made[1] - made[0]).max())
        assert change < 1e-5 if level == 4 else change > 0.01, change


@feature("fused projections made after `apply`", "refused")
def test_projections_fused_while_routed_are_refused_until_they_are_not(router: Router, stages: Stages) -> None:
    adapter, before = router.adapter, [a.processor for a in attentions(router.adapter)]
    dense = call(adapter)
    router.install(thin(stages, 2))
    expected = call(adapter)
    fuse(adapter)
    with pytest.raises(DiffesError, match=r"fused projections.*unfuse_qkv_projections"):
        call(adapter)
    for attention, processor in zip(attentions(adapter), before, strict=True):
        attention.set_processor(processor)
    assert torch.equal(call(adapter), expected)
    fuse(adapter)
    router.remove()
    torch.testing.assert_close(call(adapter), dense)


def fuse(adapter: ModelAdapter) -> None:
    for attention in attentions(adapter):
        attention.fuse_projections()
    set_processors(adapter, FusedAttnProcessor2_0())


def ip_adapter(unet: Any) -> dict[str, Any]:
    """A random IP-adapter of 4 tokens for a U-Net, as `load_ip_adapter` reads one."""
    width = unet.config.cross_attention_dim
    cross = [module.to_k for name, module in unet.named_modules() if name.endswith("attn2")]
    weights = {
        f"{2 * i + 1}.to_{part}_ip.weight": torch.randn(layer.weight.shape)
        for i, layer in enumerate(cross)
        for part in "kv"
    }
    projection = {
        "proj.weight": torch.randn(4 * width, 8), "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }  # fmt: skip
    return {"image_proj": projection, "ip_adapter": weights}


@feature("an IP-adapter loaded after `apply`", "refused")
def test_an_ip_adapter_loaded_while_applied_is_refused_and_remove_works(
    tiny_sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = make_run(tmp_path_factory, tiny_sdxl_folder, "obs")
    made = []
    for applied in (False, True):
        torch.manual_seed(0)
        pipe = open_pipe(tiny_sdxl_folder)
        weights = ip_adapter(pipe.unet)
        if applied:
            images(diffes.apply(pipe, run))
        pipe.unet._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)
        added = {"ip_adapter_image_embeds": [torch.ones(2, 1, 8)], "guidance_scale": 2.0, "num_inference_steps": 4}
        pipe.set_progress_bar_config(disable=True)
        for _ in range(1 + applied):
            try:
                made.append(pipe("h a", generator=torch.Generator().manual_seed(5), output_type="np", **added).images)
            except DiffesError as error:
                assert applied and "unload_ip_adapter" in str(error)
                diffes.remove(pipe)
    np.testing.assert_array_equal(*made)
    pipe.unload_ip_adapter()
    diffes.apply(pipe, run)


def quantise(adapter: ModelAdapter) -> None:
    weight = nn.Parameter(torch.zeros(32, 128, dtype=torch.int8), requires_grad=False)
    adapter.denoiser.transformer_blocks[0].ff.net[2].weight = weight


def compile_a_block(adapter: ModelAdapter) -> None:
    blocks = adapter.denoiser.transformer_blocks
    blocks[0] = torch.compile(blocks[0], backend="eager")


def cast_at_every_call(adapter: ModelAdapter) -> None:
    adapter.denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def parametrise(adapter: ModelAdapter) -> None:
    torch.nn.utils.parametrizations.weight_norm(adapter.denoiser.transformer_blocks[0].attn1.to_q)


@feature("fused projections, IP-adapters, fp8, quantised weights, compiled blocks before `apply`", "refused")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fuse, "unfuse_qkv_projections"),
        (lambda adapter: set_processors(adapter, IPAdapterAttnProcessor2_0(32, 32)), "unload_ip_adapter"),
        (cast_at_every_call, "enable_layerwise_casting"),
        (quantise, r"quantised.*torch.int8"),
        (compile_a_block, "torch.compile wrapped"),
        (parametrise, "no plain parameter"),
    ],
)
def test_models_that_cannot_be_cut_are_refused_by_what_they_are(
    run: Path, tiny_folder: Path, change: Callable[[ModelAdapter], None], message: str
) -> None:
    pipe = open_pipe(tiny_folder)
    change(diffes.adapters.adapter_for(pipe))
    with pytest.raises(DiffesError, match=message):
        diffes.apply(pipe, run)
    assert not pipe.transformer._forward_pre_hooks


@feature("projections that were fused before `apply` and are so no more", "equal")
def test_projections_that_were_fused_once_do_no_harm(run: Path, tiny_folder: Path) -> None:
    expected = images(diffes.apply(open_pipe(tiny_folder), run))
    pipe = open_pipe(tiny_folder)
    adapter = diffes.adapters.adapter_for(pipe)
    fuse(adapter)
    set_processors(adapter, AttnProcessor2_0())
    np.testing.assert_array_equal(images(diffes.apply(pipe, run)), expected)


@feature("blocks compiled in place (`compile_repeated_blocks`) before `apply`", "equal")
def test_blocks_compiled_in_place_are_routed(tiny_router: Router, stages: Stages) -> None:
    torch.compiler.reset()
    with tiny_router.routed(thin(stages, 2)):
        expected = call(tiny_router.adapter)
    for block in tiny_router.adapter.denoiser.transformer_blocks:
        block.compile(backend="eager")
    with tiny_router.routed(thin(stages, 2)):
        torch.testing.assert_close(call(tiny_router.adapter), expected)
    torch.compiler.reset()


@feature("a U-Net distilled with guidance (`time_cond_proj_dim`)", "equal")
def test_a_unet_distilled_with_guidance_is_routed_and_searched(tiny_sdxl: ModelAdapter, stages: Stages) -> None:
    pipe: Any = tiny_sdxl.pipe
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=8).eval()
    adapter = UNetAdapter(pipe)
    bank = small_bank(tiny_sdxl, "magnitude", stages, [1])
    scale = torch.ones(2, 8)
    handle = pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "timestep_cond": scale}), with_kwargs=True
    )
    router = Router(adapter, bank)
    with router.routed(thin(stages, 2)):
        found = call(adapter)
    with ExitStack() as stack:
        masked(adapter, bank, 2, stack)
        torch.testing.assert_close(found, call(adapter), rtol=1e-4, atol=1e-4)
    handle.remove()
    (dense,) = evaluator(router, stages)([thin(stages, 0)])  # the pipeline gives the calls their guidance
    assert dense.fitness == 0
    assert adapter.rows_per_image(3.0) == 1


def evaluator(router: Router, stages: Stages, metric: str = "latent_mse") -> ScheduleEvaluator:
    probes = router.adapter.make_probes(2, 0)
    made = make_metric(metric, torch.device("cpu"))
    return ScheduleEvaluator(router, stages, probes, n_steps=4, guidance=1.0, metric=made)
