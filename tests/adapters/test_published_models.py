"""The published configurations of DiT-XL/2-256 and SDXL base 1.0, without their weights, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from published_models import adapter_of, dit, unet

from diffes.adapters import Kind, ModelAdapter
from diffes.measure.currencies import prunable_fraction
from diffes.pruning import GroupWeights
from diffes.pruning.bank import WeightBank
from diffes.runtime.router import Router
from diffes.spaces.schedule import Schedule, Stages


@pytest.fixture(scope="module")
def dit_xl() -> ModelAdapter:
    with torch.device("meta"):
        transformer = dit()
    return adapter_of(transformer)


@pytest.fixture(scope="module")
def sdxl() -> ModelAdapter:
    with torch.device("meta"):
        network = unet()
    return adapter_of(network)


def handmade(adapter: ModelAdapter, stages: Stages, level: int, kind: Kind) -> Router:
    """Keeps the first groups of every set; a bank by a method would need the weights."""
    max_level = adapter.max_level(kind)
    entry = {p.name: GroupWeights(torch.arange(p.n_kept(level, max_level))) for p in adapter.prunable(kind)}
    router = Router(adapter, WeightBank({(0, level): entry}, kind))
    router.install(Schedule(stages, (level, 0), max_level))
    return router


def test_dit_xl_2_256(dit_xl: ModelAdapter) -> None:
    assert (dit_xl.max_level("width"), dit_xl.max_level("depth")) == (16, 28)
    sets = dit_xl.group_sets()
    assert len(sets) == 56
    assert {(g.attention is not None, g.n_groups, g.size) for g in sets} == {(True, 16, 72), (False, 4608, 1)}
    assert prunable_fraction(dit_xl, "width") == pytest.approx(0.60, abs=0.01)


def test_sdxl_base(sdxl: ModelAdapter) -> None:
    assert sum(p.numel() for p in sdxl.denoiser.parameters()) == 2_567_463_684
    assert (sdxl.max_level("width"), sdxl.max_level("depth")) == (20, 70)
    sets = sdxl.group_sets()
    assert len(sets) == 210 + 17
    assert {(g.attention is not None, g.n_groups, g.size) for g in sets} == {
        (True, 10, 64), (True, 20, 64), (False, 2560, 1), (False, 5120, 1),
        (False, 32, 10), (False, 32, 20), (False, 32, 40),
    }  # fmt: skip
    assert prunable_fraction(sdxl, "width") == pytest.approx(0.97, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["width", "depth"])
def test_a_routed_call_of_each(dit_xl: ModelAdapter, sdxl: ModelAdapter, kind: Kind) -> None:
    stages = Stages.equal(2)
    for adapter, run in ((dit_xl, call_dit), (sdxl, call_sdxl)):
        level = adapter.max_level(kind) // 2
        router = handmade(adapter, stages, level, kind)
        block = adapter.denoiser.get_submodule(adapter.blocks()[-1])
        heads = block.attn1.heads
        for timestep in (900, 100, 900):
            assert run(adapter, timestep).shape[0] == 2
            thin = timestep == 100
            if kind == "width":
                assert block.attn1.heads == (heads // 2 if thin else heads)
            else:
                assert ("forward" in block.__dict__) == thin
        router.remove()


def call_dit(adapter: ModelAdapter, timestep: int) -> torch.Tensor:
    """The router reads the timestep, which a tensor on the meta device does not have: it is moved there after that."""

    def to_meta(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        return args, kwargs | {"timestep": kwargs["timestep"].to("meta")}

    latents, labels = torch.empty(2, 4, 32, 32, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
    handle = adapter.denoiser.register_forward_pre_hook(to_meta, with_kwargs=True)
    try:
        return adapter.denoiser(latents, timestep=torch.tensor([timestep] * 2), class_labels=labels).sample
    finally:
        handle.remove()


def call_sdxl(adapter: ModelAdapter, timestep: int) -> torch.Tensor:
    added = {"text_embeds": torch.empty(2, 1280, device="meta"), "time_ids": torch.empty(2, 6, device="meta")}
    latents, text = torch.empty(2, 4, 128, 128, device="meta"), torch.empty(2, 77, 2048, device="meta")
    return adapter.denoiser(latents, timestep, encoder_hidden_states=text, added_cond_kwargs=added).sample
