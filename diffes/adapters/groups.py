"""What can be removed from a denoiser: heads, FFN channels, blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["width", "depth"]


class Prunable:
    """Groups that compete with each other for their place at a level."""

    name: str
    n_groups: int

    def n_kept(self, level: int, max_level: int) -> int:
        """Groups left at a level: `n_groups * (1 - level / max_level)`, rounded to whole groups, halves up."""
        return math.floor(self.n_groups * (max_level - level) / max_level + 0.5)


@dataclass(frozen=True)
class GroupSet(Prunable):
    """Groups inside one layer (width): the heads of an attention or the channels of an FFN.

    Removing a group takes its rows out of every producer and its columns out of the consumer.

    Args:
        name: module path inside the denoiser; also the name in a bank.
        kind: "heads" or "channels".
        n_groups: how many there are when dense.
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
        """Consumer input indices (n * size,) of group indices (n,), group by group."""
        return (groups[:, None] * self.size + torch.arange(self.size, device=groups.device)).flatten()


@dataclass(frozen=True)
class BlockSet(Prunable):
    """All transformer blocks of a denoiser (depth): a removed one hands its input on.

    Args:
        blocks: module paths, in the order of the forward pass.
        name: the name in a bank.
    """

    blocks: tuple[str, ...]
    name: str = "blocks"

    @property
    def n_groups(self) -> int:  # type: ignore[override]
        return len(self.blocks)


def heads_of(path: str, attention: Any) -> GroupSet:
    """The heads of one of diffusers' attention layers at a module path."""
    heads = attention.heads
    size = attention.to_out[0].weight.shape[1] // heads
    producers = tuple(f"{path}.{part}" for part in ("to_q", "to_k", "to_v"))
    return GroupSet(path, "heads", heads, size, producers, f"{path}.to_out.0")


class NoHeads:
    """Attention processor of a layer that has lost all its heads: the output projection's bias is all that is left."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = torch.zeros_like(hidden_states)
        return out if attn.to_out[0].bias is None else out + attn.to_out[0].bias


def hand_on(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    """The forward of a block that is skipped, of those that take and return one tensor."""
    return hidden_states
