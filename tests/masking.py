"""Oracles of routing: a model masked by hand, and everything that routing may touch."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from diffes.adapters import BlockSet, GroupSet, ModelAdapter
from diffes.pruning.bank import WeightBank


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


def masked(adapter: ModelAdapter, bank: WeightBank, level: int, stack: ExitStack) -> None:
    """The dense model with what a level of stage 1 drops made ineffective, at full width and depth."""
    for prunable in adapter.prunable(bank.kind):
        thin = bank[1, level].get(prunable.name)
        if thin is None:  # dense at this level
            continue
        if isinstance(prunable, GroupSet):
            columns = prunable.features(thin.kept.long())
            for i, path in enumerate(prunable.consumers):
                layer = adapter.denoiser.get_submodule(path)
                dense, full = layer.weight.data, torch.zeros_like(layer.weight)
                full[:, columns] = thin.consumers[i] if thin.consumers else dense[:, columns]
                layer.weight.data = full
                stack.callback(setattr, layer.weight, "data", dense)
        elif isinstance(prunable, BlockSet):
            for i, path in enumerate(prunable.blocks):
                if i not in thin.kept:
                    block = adapter.denoiser.get_submodule(path)
                    stack.callback(block.register_forward_hook(handed_on, with_kwargs=True).remove)


def handed_on(_block: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """What goes into a block, in the form of what comes out: joint blocks return the states of the text first."""
    if isinstance(output, tuple):
        return kwargs["encoder_hidden_states"], kwargs["hidden_states"]
    return args[0]
