"""Layers of diffusers' conditional U-Nets, on the encoder and decoder paths, in the order in which they are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffes.adapters.groups import UpLayerSet


def unet_layers(unet: Any) -> UpLayerSet:
    """Return the decoder path of a `UNet2DConditionModel`. Each decoder layer reads one output of the encoder path; the
    last layer reads the first output.

    Source: `UNet2DConditionModel.forward` and its blocks (diffusers 0.42).
    """
    down: list[tuple[str, ...]] = [("conv_in",)]
    for i, block in enumerate(unet.down_blocks):
        down += _layers(block, f"down_blocks.{i}")
        down += [(f"down_blocks.{i}.downsamplers.{j}",) for j in range(len(block.downsamplers or ()))]
    middle = [name for names in _middle(unet.mid_block) for name in names]
    up: list[tuple[str, ...]] = []
    for i, block in enumerate(unet.up_blocks):
        layers = list(_layers(block, f"up_blocks.{i}"))
        samplers = tuple(f"up_blocks.{i}.upsamplers.{j}" for j in range(len(block.upsamplers or ())))
        up += [*layers[:-1], (*layers[-1], *samplers)]
    sources = [(middle or down[-1])[-1], *(names[-1] for names in up[:-1])]
    return UpLayerSet(tuple(sources), tuple(up), tuple(reversed(down)), tuple(middle))


def _layers(block: Any, path: str) -> Iterator[tuple[str, ...]]:
    """Yield the module paths of each layer: a residual block and the attention after it, where there is one."""
    attentions = len(getattr(block, "attentions", ()))
    for i in range(len(block.resnets)):
        yield (f"{path}.resnets.{i}", *((f"{path}.attentions.{i}",) if i < attentions else ()))


def _middle(block: Any) -> Iterator[tuple[str, ...]]:
    """Yield the first residual block, then each attention with the residual block after it."""
    if block is None:
        return
    yield ("mid_block.resnets.0",)
    for i, attention in enumerate(getattr(block, "attentions", ())):
        yield (*((f"mid_block.attentions.{i}",) if attention is not None else ()), f"mid_block.resnets.{i + 1}")
