"""Sets of groups that can be removed from a denoiser (heads, FFN channels, blocks) or reused from an earlier call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor

Kind = Literal["width", "depth", "reuse"]


class Prunable:
    """Set of groups that compete with each other for their place at a level."""

    name: str
    n_groups: int

    def n_kept(self, level: int, max_level: int) -> int:
        """Return the number of groups left at a level: `n_groups * (1 - level / max_level)`, rounded to whole groups,
        halves up."""
        return math.floor(self.n_groups * (max_level - level) / max_level + 0.5)


@dataclass(frozen=True)
class GroupSet(Prunable):
    """Groups inside one layer (width): the heads of an attention or the channels of an FFN.

    Removing a group removes its rows from every producer and its columns from the consumer.

    Args:
        name: module path inside the denoiser; also the name in a bank.
        kind: "heads" or "channels".
        n_groups: number of groups in the dense model.
        size: consumer inputs per group: the head's width, or 1.
        producers: paths of the linear layers whose output rows belong to the groups; of a gated FFN (GEGLU), channel i
            is row i and row n_groups + i.
        consumer: path of the linear layer that reads them.
    """

    name: str
    kind: Literal["heads", "channels"]
    n_groups: int
    size: int
    producers: tuple[str, ...]
    consumer: str

    def features(self, groups: Tensor) -> Tensor:
        """Return the consumer input indices (n * size,) of group indices (n,), group by group."""
        return (groups[:, None] * self.size + torch.arange(self.size, device=groups.device)).flatten()


@dataclass(frozen=True)
class BlockSet(Prunable):
    """All transformer blocks of a denoiser (depth). A removed block returns its input.

    Args:
        blocks: module paths, in the order of the forward pass.
        name: the name in a bank.
    """

    blocks: tuple[str, ...]
    name: str = "blocks"

    @property
    def n_groups(self) -> int:  # type: ignore[override]
        return len(self.blocks)


@dataclass(frozen=True)
class ReuseSet(Prunable):
    """Layers that are either computed, or left out by reusing an output from the last call that computed it (reuse).

    Args:
        sources: (n,) module paths whose outputs may be reused.
    """

    sources: tuple[str, ...]

    @property
    def n_groups(self) -> int:  # type: ignore[override]
        return len(self.sources)

    def recalled(self, kept: Sequence[int]) -> list[str]:
        """Return the module paths that return an earlier output where only the groups `kept` are computed."""
        raise NotImplementedError

    def idle(self, kept: Sequence[int]) -> list[str]:
        """Return the module paths that then need not be computed."""
        return []


@dataclass(frozen=True)
class BranchSet(ReuseSet):
    """Attentions and FFNs of all transformer blocks, in the order of the forward pass, each its own source. Gates,
    norms and residual connections around them are computed in every call.

    Args:
        name: the name in a bank.
    """

    name: str = "branches"

    def recalled(self, kept: Sequence[int]) -> list[str]:
        computed = set(kept)
        return [path for i, path in enumerate(self.sources) if i not in computed]


@dataclass(frozen=True)
class UpLayerSet(ReuseSet):
    """Layers of a U-Net's decoder path. Each reads, beside its input, the output of a layer of the encoder path.

    The outermost layers of both paths are computed. The input of the first computed decoder layer is reused from the
    last call that computed it, and nothing further inside is computed. The groups kept are always the last ones. Source
    i is the module whose output enters decoder layer i.

    Args:
        up: (n,) the modules of decoder layer i.
        down: (n,) the encoder modules whose output decoder layer i reads, without those of the layers after i.
        middle: the modules between the encoder and decoder paths.
        name: the name in a bank.

    Source: DeepCache.
    """

    up: tuple[tuple[str, ...], ...]
    down: tuple[tuple[str, ...], ...]
    middle: tuple[str, ...]
    name: str = "up_layers"

    def recalled(self, kept: Sequence[int]) -> list[str]:
        return [self.sources[min(kept)]] if min(kept) else []

    def idle(self, kept: Sequence[int]) -> list[str]:
        first = min(kept)
        if not first:
            return []
        inside = [path for paths in (*self.down[:first], *self.up[:first]) for path in paths]
        return [path for path in (*inside, *self.middle) if path != self.sources[first]]


AnySet = GroupSet | BlockSet | ReuseSet
REUSE_SETS = frozenset({BranchSet.name, UpLayerSet.name})


def heads_of(path: str, attention: Any) -> GroupSet:
    """Return the heads of one of diffusers' attention layers at a module path."""
    heads = attention.heads
    size = attention.to_out[0].weight.shape[1] // heads
    producers = tuple(f"{path}.{part}" for part in ("to_q", "to_k", "to_v"))
    return GroupSet(path, "heads", heads, size, producers, f"{path}.to_out.0")


PLAIN_PROCESSORS = {AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor, SlicedAttnProcessor}
"""Processors whose attention depends on its projections alone."""


class NoHeads:
    """Forward of an attention layer that has lost all its heads: only the output projection's bias is left."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = torch.zeros_like(hidden_states)
        return out if attn.to_out[0].bias is None else out + attn.to_out[0].bias


def hand_on(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    """Return the input: the forward of a skipped block that takes and returns one tensor."""
    return hidden_states
