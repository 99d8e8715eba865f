from __future__ import annotations

from typing import Any

import pytest
import torch

from diffes.adapters import ClassifierFreeGuidance, ModelAdapter

LATENTS = torch.arange(3.0).view(3, 1, 1, 1)


@pytest.mark.parametrize("null_first", [False, True])
def test_rows_conditions_and_the_mix_agree_on_the_order_of_branches(null_first: bool) -> None:
    guided = ClassifierFreeGuidance(3.0, null_first=null_first)
    assert torch.equal(guided.rows(LATENTS), torch.cat([LATENTS, LATENTS]))
    conditions = guided.conditions(["a", "b", "c"])
    assert conditions == ((None,) * 3 + ("a", "b", "c") if null_first else ("a", "b", "c") + (None,) * 3)
    said = torch.tensor([-1.0 if c is None else 1.0 for c in conditions]).view(6, 1, 1, 1) + guided.rows(LATENTS)
    conditional, null = guided.split(said)
    assert torch.equal(conditional, LATENTS + 1) and torch.equal(null, LATENTS - 1)
    assert torch.equal(guided.mixed(said), LATENTS - 1 + 3 * 2)


def test_images_may_have_scales_of_their_own() -> None:
    rows = torch.cat([LATENTS, LATENTS - 2]).to(torch.bfloat16)
    mixed = ClassifierFreeGuidance(2.0, (1.5, 2.0, 4.0)).mixed(rows)
    assert mixed.dtype == torch.bfloat16 and mixed.flatten().tolist() == [1, 3, 8]
    same = ClassifierFreeGuidance(2.5, (2.5,) * 3)
    assert torch.equal(same.mixed(rows), ClassifierFreeGuidance(2.5).mixed(rows))


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_without_guidance_a_call_has_one_branch(scale: float) -> None:
    guided = ClassifierFreeGuidance(scale)
    assert guided.branches == 1 and guided.conditions([1, 2, 3]) == (1, 2, 3)
    assert guided.rows(LATENTS) is LATENTS and guided.mixed(LATENTS) is LATENTS


def test_a_call_has_as_many_rows_as_its_guidance_says(untrained: ModelAdapter) -> None:
    seen: list[int] = []

    def count(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(len(args[0] if args else kwargs["hidden_states"]))

    untrained.denoiser.register_forward_pre_hook(count, with_kwargs=True)
    probes = untrained.make_probes(3, 0).over(1.5, 4.0)
    for guidance in (1.0, 2.0):
        untrained.sample(probes, 1, guidance)
        assert seen.pop() == 3 * untrained.guided(guidance).branches
    assert untrained.guided(2.0, probes).scales == probes.guidance
