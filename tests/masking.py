"""Oracles of routing: a model masked by hand, and everything that routing may touch."""

from __future__ import annotations

import torch

from diffes.adapters import ModelAdapter
from diffes.testing.adapters import masked

__all__ = ["assert_dense", "masked", "state"]


def state(adapter: ModelAdapter) -> dict[str, object]:
    """Everything about a denoiser that routing may touch."""
    found: dict[str, object] = {name: tensor.clone() for name, tensor in adapter.denoiser.state_dict().items()}
    for name, module in adapter.denoiser.named_modules():
        hooks = len(module._forward_pre_hooks), len(module._state_dict_pre_hooks)
        found[f"{name}:own"] = sorted(set(module.__dict__) & {"forward"}), hooks
        if hasattr(module, "heads"):
            found[f"{name}:heads"] = module.heads, type(module.processor)
    return found


def assert_dense(adapter: ModelAdapter, before: dict[str, object]) -> None:
    after = state(adapter)
    assert after.keys() == before.keys()
    for name, value in before.items():
        now = after[name]
        if isinstance(value, torch.Tensor):
            assert isinstance(now, torch.Tensor) and torch.equal(now, value), name
        else:
            assert now == value, name
