"""Checks that a denoiser can be routed. Each error names the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from diffes.adapters import GroupSet, ModelAdapter
from diffes.adapters.groups import is_fused
from diffes.errors import DiffesError

COMPUTED_IN = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def check_not_offloaded(denoiser: Any) -> None:
    """Check that nothing else moves the denoiser's parameters between devices.

    Raises:
        DiffesError: hooks of accelerate, or of diffusers' group offloading, are on it.
    """
    own = vars(denoiser)  # checked at every call, and a failed `getattr` of a module takes ten times as long
    registry = own.get("_diffusers_hook")
    grouped = registry is not None and any("group_offloading" in name for name in registry.hooks)
    if "_hf_hook" in own or grouped:
        raise DiffesError(
            "the denoiser is offloaded (for instance by enable_model_cpu_offload or enable_group_offload). Its weights "
            "move between devices while it runs, so pruned weights cannot be put in. Call pipe.remove_all_hooks(), "
            "move the pipeline to one device, and apply again."
        )


def check_cuttable(adapter: ModelAdapter) -> None:
    """Check that all layers of a denoiser can be found by name and cut to pruned ones.

    Raises:
        DiffesError: a layer inside it was compiled by itself, weights are quantised or cast at every call, or attention
            has fused projections or weights of its own.
    """
    for path, module in adapter.denoiser.named_modules():
        if hasattr(module, "_orig_mod"):
            raise DiffesError(
                f"torch.compile wrapped {path} in another module, so its layers have other names. Load the pipeline "
                "again and compile after diffes.apply, or compile in place with denoiser.compile_repeated_blocks()."
            )
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and "layerwise_casting" in registry.hooks:
            raise DiffesError(
                f"the weights of {path} are cast at every call (enable_layerwise_casting), so pruned weights cannot be "
                "put in. Load the pipeline without layerwise casting."
            )
    for path, parameter in adapter.denoiser.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.dtype not in COMPUTED_IN:
            raise DiffesError(
                f"{path} is quantised or not a plain tensor ({type(parameter).__name__} of {parameter.dtype}), so it "
                "cannot be pruned. Load the pipeline in float64, float32, float16 or bfloat16."
            )
    for groups in adapter.group_sets():
        if groups.attention is not None:
            check_attention(groups.attention, adapter.denoiser.get_submodule(groups.attention))


def check_attention(name: str, attention: Any) -> None:
    """Check that attention reads no other weights than those that are cut.

    Raises:
        DiffesError: its projections are fused, or its processor has weights (IP-Adapter).
    """
    if isinstance(attention.processor, nn.Module):
        raise DiffesError(
            f"{name} has an adapter loaded (IP-Adapter?), which cannot be pruned. Call pipe.unload_ip_adapter()."
        )
    if is_fused(attention):
        raise DiffesError(f"{name} has fused projections, which cannot be pruned. Call pipe.unfuse_qkv_projections().")


def tree_of(denoiser: nn.Module, sets: Sequence[GroupSet]) -> Iterator[tuple[dict[str, Any], str, nn.Module]]:
    """Yield each step of the module tree on the way to the layers of the sets: the children of a module, the name of
    one of them, and this child."""
    known = set()
    for path in (path for groups in sets for path in (*groups.producers, *groups.consumers)):
        module = denoiser
        for name in path.split("."):
            child = module.get_submodule(name)
            if (id(module), name) not in known:
                known.add((id(module), name))
                yield module._modules, name, child
            module = child


def replaced() -> DiffesError:
    """Return the error for layers that are no longer those that are routed."""
    return DiffesError(
        "layers of the model were replaced while a run was applied (was a LoRA loaded, fused or unloaded?). Call "
        "diffes.remove(pipe), change the model, and call diffes.apply again."
    )


def written(name: str) -> DiffesError:
    """Return the error for weights of a layer that were written to."""
    return DiffesError(
        f"weights of {name} were changed while a run was applied (by a training step, load_state_dict or a scaled "
        "LoRA?). Changes to pruned weights are lost at the next stage. Call diffes.remove(pipe), change the weights, "
        "and call diffes.apply again. The run was searched for the weights before."
    )
