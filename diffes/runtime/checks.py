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
            "the denoiser is offloaded (enable_model_cpu_offload, enable_group_offload or another of that kind): its "
            "weights move between devices while it runs, so they cannot be routed; call pipe.remove_all_hooks(), move "
            "the pipeline to one device, then apply"
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
                f"{path} was compiled for itself (torch.compile put another module around it), so its layers go by "
                "other names; load the pipeline anew, apply, and only then compile, or compile in place: "
                "denoiser.compile_repeated_blocks()"
            )
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and "layerwise_casting" in registry.hooks:
            raise DiffesError(
                f"the weights of {path} are cast at every call (enable_layerwise_casting), so they cannot be routed; "
                "load the pipeline without it"
            )
    for path, parameter in adapter.denoiser.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.dtype not in COMPUTED_IN:
            raise DiffesError(
                f"{path} is quantised, or stored as no plain tensor ({type(parameter).__name__} of {parameter.dtype}): "
                "pruned layers can be cut from float64, float32, float16 and bfloat16 alone; load the pipeline so"
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
            f"{name} has an adapter of its own (IP-Adapter?), which cannot be cut to pruned layers; call "
            "pipe.unload_ip_adapter()"
        )
    if is_fused(attention):
        raise DiffesError(
            f"{name} has fused projections, which are copies that cannot be cut to pruned layers; call "
            "pipe.unfuse_qkv_projections()"
        )


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
        "layers of the model were replaced (a LoRA loaded, fused or unloaded?) while a schedule was routed through it: "
        "call diffes.remove(pipe), load it, call diffes.apply again"
    )


def written(name: str) -> DiffesError:
    """Return the error for weights of a layer that were written to."""
    return DiffesError(
        f"weights of {name} were written to (a training step, load_state_dict, a scaled LoRA?) while a schedule was "
        "routed through it; what is written to pruned weights is lost at the next stage, and a run is made for the "
        "weights that it was searched on: call diffes.remove(pipe), write, call diffes.apply again"
    )
