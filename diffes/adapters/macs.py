"""Multiply-accumulates of a denoiser call, of the whole network and of its parts, counted by torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Size
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from diffes.adapters.base import ModelAdapter


def _attention_flops(query: Size, key: Size, value: Size, *_args: object, **_kwargs: object) -> int:
    return int(sdpa_flop_count(query, key, value))


# torch counts the attention kernels of GPUs by itself, and of the CPU's only those that are made of matrix products
ATTENTION_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@torch.no_grad()
def call_once(adapter: ModelAdapter, timestep: int) -> None:
    """One denoiser call on a batch of one."""
    probe = adapter.make_probes(1, 0)
    latents = probe.noise.to(adapter.device, adapter.dtype)
    adapter.denoise_once(latents, torch.tensor([timestep]), probe.conditions)


def macs_by_module(adapter: ModelAdapter, timestep: int = 0) -> dict[str, int]:
    """Multiply-accumulates in each module of the denoiser, by path, of one call on a batch of one; "" is all of it.

    Counted over every matrix product, convolution and attention, with the weights that the timestep is routed to.
    """
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
        call_once(adapter, timestep)
    root = type(adapter.denoiser).__name__  # text encoders may have run as well
    counts = {name: sum(by_operator.values()) // 2 for name, by_operator in counter.get_flop_counts().items()}
    return {"": counts[root]} | {n.removeprefix(f"{root}."): c for n, c in counts.items() if n.startswith(f"{root}.")}


def macs_per_call(adapter: ModelAdapter, timestep: int = 0) -> int:
    """Multiply-accumulates of one denoiser call on a batch of one, with the weights that the timestep is routed to."""
    return macs_by_module(adapter, timestep)[""]


def macs_per_group(adapter: ModelAdapter, counts: Mapping[str, int]) -> dict[str, float]:
    """Multiply-accumulates that one group of each group set takes, of the dense model's (see `macs_by_module`).

    All of an attention layer is proportional to its heads, all of an FFN to its channels, and no set changes what
    another one costs: what a thin network saves is the sum over the groups that it lacks, exactly.
    """
    return {
        groups.name: counts[groups.name] / groups.n_groups
        for groups in adapter.group_sets() if groups.name in counts
    }  # fmt: skip
