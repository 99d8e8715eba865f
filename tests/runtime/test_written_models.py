"""What is written to, and copied out of, a model while a schedule is routed through it: kept, dense, or refused.

Tests with the mark `feature` are the rows of `benchmarks/results/router_features.md`.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import images, open_pipe, small_bank
from diffusers import (
    ControlNetModel,
    UNet2DConditionModel,
)
from masking import assert_dense, state
from test_apply import add_lora
from test_changed_models import call, thin
from torch import nn

import diffes
from diffes.adapters import ModelAdapter
from diffes.errors import DiffesError
from diffes.runtime.router import Router
from diffes.spaces.schedule import Stages

feature = pytest.mark.feature


@pytest.fixture(autouse=True)
def no_warnings_but_those_expected() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="weights of the model were written")
        yield


def consumer(adapter: ModelAdapter) -> Any:
    return adapter.denoiser.get_submodule(adapter.group_sets()[0].consumers[0])


def train(adapter: ModelAdapter) -> None:
    weight = consumer(adapter).weight
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight]).step()


def double_lora(adapter: ModelAdapter) -> None:
    with torch.no_grad():
        for name, parameter in adapter.denoiser.named_parameters():
            if "to_q.lora_B" in name:
                parameter *= 2


def assign_data(adapter: ModelAdapter) -> None:
    weight = consumer(adapter).weight
    weight.data = weight.data * 2


def assign_parameter(adapter: ModelAdapter) -> None:
    layer = consumer(adapter)
    layer.weight = nn.Parameter(layer.weight.detach().clone())


@feature("writes to weights while routed: an optimizer's step, a scaled LoRA, new tensors or parameters", "refused")
@pytest.mark.parametrize("change", [train, double_lora, assign_data, assign_parameter])
def test_writes_to_thin_weights_are_refused(
    untrained: ModelAdapter, stages: Stages, change: Callable[[ModelAdapter], None]
) -> None:
    if change is double_lora:
        add_lora(untrained)
    router = Router(untrained, small_bank(untrained, "magnitude", stages, [1], allocation="equal"))
    before = state(untrained)
    router.install(thin(stages, 2))
    call(untrained)
    change(untrained)
    with pytest.raises(DiffesError, match="were changed while a run was applied"):
        call(untrained)
    if change is not assign_parameter:
        with pytest.raises(DiffesError, match="were changed while a run was applied"):
            untrained.denoiser.state_dict()
        with pytest.warns(UserWarning, match="is lost"):
            router.remove()
        assert_dense(untrained, before)


@feature("writes to weights while routed: an optimizer's step, a scaled LoRA, new tensors or parameters", "refused")
def test_writes_in_a_dense_stage_are_refused_and_kept(router: Router, stages: Stages) -> None:
    adapter = router.adapter
    router.install(thin(stages, 2))
    call(adapter, 900)
    train(adapter)
    written = consumer(adapter).weight.clone()
    with pytest.raises(DiffesError, match="were changed while a run was applied"):
        call(adapter)
    router.remove()
    assert torch.equal(consumer(adapter).weight, written)


@feature("weights moved away and back while routed", "equal")
def test_weights_that_were_moved_and_came_back_are_those_that_were_loaded(router: Router, stages: Stages) -> None:
    adapter = router.adapter
    with router.routed(thin(stages, 2)):
        expected = call(adapter)
        for parameter in adapter.denoiser.parameters():
            parameter.data = parameter.data.clone()  # as `to` does
        torch.testing.assert_close(call(adapter), expected)


@feature("`load_state_dict` while routed", "refused")
def test_weights_loaded_while_routed_are_kept_and_the_next_call_is_refused(router: Router, stages: Stages) -> None:
    adapter = router.adapter
    weights = {name: tensor + 1 for name, tensor in adapter.denoiser.state_dict().items()}
    router.install(thin(stages, 2))
    call(adapter)
    adapter.denoiser.load_state_dict(weights)
    with pytest.raises(DiffesError, match=r"were changed while a run was applied .*load_state_dict"):
        call(adapter)
    router.remove()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in adapter.denoiser.state_dict().items())


@feature("`state_dict` of a block, `ControlNetModel.from_unet`, of a routed model", "equal")
def test_what_is_copied_out_of_a_routed_model_is_dense(router: Router, stages: Stages) -> None:
    adapter = router.adapter
    before = {path: {k: v.clone() for k, v in adapter.denoiser.get_submodule(path).state_dict().items()}
              for path in (*adapter.blocks(), consumer_path(adapter))}  # fmt: skip
    with router.routed(thin(stages, 2)):
        expected = call(adapter)
        for path, weights in before.items():
            found = adapter.denoiser.get_submodule(path).state_dict()
            assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
            assert torch.equal(call(adapter), expected)
        if isinstance(adapter.denoiser, UNet2DConditionModel):
            net = ControlNetModel.from_unet(adapter.denoiser)
            found = net.state_dict()
            assert torch.equal(call(adapter), expected)
            dense = ControlNetModel.from_unet(copy.deepcopy(adapter).denoiser).down_blocks.state_dict()
            assert all(torch.equal(found[f"down_blocks.{name}"], tensor) for name, tensor in dense.items())


def consumer_path(adapter: ModelAdapter) -> str:
    return adapter.group_sets()[0].consumers[0]


@pytest.mark.slow
@feature("a deep copy of a routed model or pipeline", "equal")
def test_a_deep_copy_of_an_applied_pipeline_is_one_of_its_own(any_run: Path, tiny_model: Path) -> None:
    pipe = open_pipe(tiny_model)
    dense = images(pipe, 4)
    pruned = images(diffes.apply(pipe, any_run), 4)
    copied = copy.deepcopy(pipe)
    np.testing.assert_allclose(images(copied, 4), pruned, atol=1e-5)
    copied_denoiser = copied.components.get("unet") or copied.components["transformer"]
    copied_denoiser.state_dict()
    np.testing.assert_array_equal(images(pipe, 4), pruned)
    np.testing.assert_allclose(images(diffes.remove(copied), 4), dense, atol=1e-5)
    np.testing.assert_array_equal(images(pipe, 4), pruned)


@feature("`pickle` or `torch.save` of a routed model", "refused")
def test_pickles_of_a_routed_model_are_refused(tiny_router: Router, stages: Stages) -> None:
    denoiser = tiny_router.adapter.denoiser
    with tiny_router.routed(thin(stages, 2)):
        for save in (pickle.dumps, lambda model: torch.save(model, io.BytesIO())):
            with pytest.raises(DiffesError, match=r"cannot be pickled: call diffes.remove"):
                save(denoiser)
    pickle.loads(pickle.dumps(denoiser))


@feature("runs in inference mode, then outside of it", "equal")
def test_weights_loaded_in_inference_mode_are_plain(router: Router, stages: Stages) -> None:
    with router.routed(thin(stages, 2)):
        with torch.inference_mode():
            found = call(router.adapter)
        assert not consumer(router.adapter).weight.is_inference()
        assert torch.equal(call(router.adapter), found)
