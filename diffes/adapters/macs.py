"""Multiply-accumulates of a denoiser call, for the whole network and for its parts, counted by torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Size
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from diffes.adapters.base import ModelAdapter


def _attention_flops(query: Size, key: Size, value: Size, *_args: object, **_kwargs: object) -> int:
    return int(sdpa_flop_count(query, key, value))


# torch counts attention kernels of GPUs itself, but of those of the CPU only the ones made of matrix products
ATTENTION_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@torch.no_grad()
def call_once(adapter: ModelAdapter, timestep: int) -> None:
    """Make one denoiser call on a batch of one."""
    probe = adapter.make_probes(1, 0)
    latents = adapter.noise(probe)
    adapter.denoise_once(latents, torch.tensor([timestep]), probe.conditions)


def macs_by_module(adapter: ModelAdapter, timestep: int = 0) -> dict[str, int]:
    """Return the multiply-accumulates in each module of the denoiser, by path, for one call on a batch of one. "" is
    the whole denoiser.

    Every matrix product, convolution and attention is counted, with the weights that the timestep is routed to.
    """
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
        call_once(adapter, timestep)
    root = type(adapter.denoiser).__name__  # text encoders may have run as well
    counts = {name: sum(by_operator.values()) // 2 for name, by_operator in counter.get_flop_counts().items()}
    return {"": counts[root]} | {n.removeprefix(f"{root}."): c for n, c in counts.items() if n.startswith(f"{root}.")}


def macs_per_call(adapter: ModelAdapter, timestep: int = 0) -> int:
    """Return the multiply-accumulates of one denoiser call on a batch of one, with the weights that the timestep is
    routed to."""
    return macs_by_module(adapter, timestep)[""]


def macs_per_group(adapter: ModelAdapter, counts: Mapping[str, int]) -> dict[str, float]:
    """Return the multiply-accumulates of one group of each group set, from counts of the dense model
    (`macs_by_module`).

    The cost of an attention layer is proportional to its heads, that of an FFN or of two convolutions to the channels
    between, and no set changes the cost of another. So a pruned network saves exactly the sum over the groups that it
    lacks.
    """
    found = {}
    for groups in adapter.group_sets():
        shares = dict.fromkeys(groups.counted or (groups.name,), 1.0)
        if groups.first is not None:  # its part of the consumer that it shares
            (consumer,) = groups.consumers
            shares[consumer] = groups.width / adapter.denoiser.get_submodule(consumer).weight.shape[1]
        if all(path in counts for path in shares):
            found[groups.name] = sum(counts[path] * share for path, share in shares.items()) / groups.n_groups
    return found
