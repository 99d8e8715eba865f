"""Sets of groups that can be removed from a denoiser (heads, FFN channels, blocks) or reused from an earlier call."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor

Kind = Literal["width", "depth", "reuse"]


class Prunable:
    """Set of groups that compete with each other for their place at a level.

    Attributes:
        kind: how groups are left out: "width" inside layers, "depth" as whole blocks, "reuse" by earlier outputs.
        name: the name in a bank.
        n_groups: number of groups in the dense model.
        size: inputs of each consumer that belong to one group.
        consumers: paths of the linear layers and convolutions whose inputs go with the groups; none where whole modules
            are left out.
        interchangeable: True where the cost of a call depends on how many groups are left, not on which ones.
    """

    kind: ClassVar[Kind]
    name: str
    n_groups: int
    size: int = 1
    consumers: tuple[str, ...] = ()
    interchangeable: ClassVar[bool] = False

    def n_kept(self, level: int, max_level: int) -> int:
        """Return the number of groups left at a level: `n_groups * (1 - level / max_level)`, rounded to whole groups,
        halves up."""
        return math.floor(self.n_groups * (max_level - level) / max_level + 0.5)

    @property
    def label(self) -> str:
        """Short name, for figures."""
        return re.sub(r"transformer_blocks\.|attentions\.|_blocks", "", self.name)

    @property
    def removed(self) -> tuple[str, ...]:
        """Beginnings of the names of the parameters that go with the groups."""
        return ()

    def check_kept(self, kept: Tensor) -> None:
        """Check the indices (n_kept,) of the groups that stay.

        Raises:
            ValueError: they do not rise, or one is out of range.
        """
        if len(kept) and (kept[0] < 0 or kept[-1] >= self.n_groups or bool((kept.diff() <= 0).any())):
            raise ValueError(
                f"the groups kept of {self.name} must rise within [0, {self.n_groups - 1}], got {kept.tolist()[:20]}"
            )


@dataclass(frozen=True)
class GroupSet(Prunable):
    """Groups inside layers (width): the heads of an attention, the channels of an FFN or of a ResNet block.

    Removing a group removes its rows from every producer and its columns from every consumer.

    Args:
        name: module path inside the denoiser; also the name in a bank.
        n_groups: number of groups in the dense model.
        size: inputs of each consumer that belong to one group: the head's width, or 1.
        producers: paths of the linear layers whose output rows belong to the groups. Group i has the rows
            [i * size, (i + 1) * size) and, in a layer with a multiple of n_groups * size rows, the same ones of each
            multiple: of a gated FFN (GEGLU), channel i is row i and row n_groups + i.
        consumers: paths of the linear layers that read them, of one shape.
        attention: path of the attention module whose heads the groups are; None for channels.
        norm: path of the normalisation whose groups they are, one of the producers; None where they are not.
        counted: paths of the modules whose cost falls with the groups; `name` when left out.
        first: first of the set's inputs among those of its consumer, if other sets have the other inputs; None where
            the consumers read this set alone.
    """

    kind = "width"
    interchangeable = True

    name: str
    n_groups: int
    size: int = field()
    producers: tuple[str, ...]
    consumers: tuple[str, ...] = field()
    attention: str | None = None
    norm: str | None = None
    counted: tuple[str, ...] = ()
    first: int | None = None

    @property
    def width(self) -> int:
        """Number of inputs of each consumer."""
        return self.n_groups * self.size

    @property
    def removed(self) -> tuple[str, ...]:
        return (*(f"{path}." for path in self.producers), *(f"{path}.weight" for path in self.consumers))

    def n_kept(self, level: int, max_level: int) -> int:
        """Return the number of groups left at a level. Of those that are normalised one stays."""
        return max(super().n_kept(level, max_level), 0 if self.norm is None else 1)

    def check_kept(self, kept: Tensor) -> None:
        super().check_kept(kept)
        if self.norm is not None and not len(kept):
            raise ValueError(f"one group of {self.name} has to stay, because it is normalised")

    def own(self, inputs: Tensor, dim: int = -1) -> Tensor:
        """Return those of a consumer's inputs, or of its weight's columns, that are the set's."""
        return inputs if self.first is None else inputs.narrow(dim, self.first, self.width)

    def features(self, groups: Tensor) -> Tensor:
        """Return the indices (n * size,) of group indices (n,), group by group, among the set's inputs."""
        return (groups[:, None] * self.size + torch.arange(self.size, device=groups.device)).flatten()


@dataclass(frozen=True)
class BlockSet(Prunable):
    """All transformer blocks of a denoiser (depth). A removed block returns its input.

    Args:
        blocks: module paths, in the order of the forward pass.
        name: the name in a bank.
    """

    kind = "depth"

    blocks: tuple[str, ...]
    name: str = "blocks"

    @property
    def n_groups(self) -> int:  # type: ignore[override]
        return len(self.blocks)

    @property
    def removed(self) -> tuple[str, ...]:
        return tuple(f"{path}." for path in self.blocks)


@dataclass(frozen=True)
class ReuseSet(Prunable):
    """Layers that are either computed, or left out by reusing an output from the last call that computed it (reuse).

    Args:
        sources: (n,) module paths whose outputs may be reused.
    """

    kind = "reuse"

    sources: tuple[str, ...]

    @property
    def n_groups(self) -> int:  # type: ignore[override]
        return len(self.sources)

    @property
    def modules(self) -> frozenset[str]:
        """Module paths that may return an earlier output, or need not be computed."""
        return frozenset([*self.sources, *self.idle([self.n_groups - 1])])

    def recalled(self, kept: Sequence[int]) -> list[str]:
        """Return the module paths that return an earlier output where only the groups `kept` are computed."""
        raise NotImplementedError

    def idle(self, kept: Sequence[int]) -> list[str]:
        """Return the module paths that then need not be computed."""
        raise NotImplementedError


@dataclass(frozen=True)
class BranchSet(ReuseSet):
    """Attentions and FFNs of all transformer blocks, in the order of the forward pass, each its own source. Gates,
    norms and residual connections around them are computed in every call.

    Args:
        inside: (n,) paths of the modules that only source i reads.
        name: the name in a bank.
    """

    inside: tuple[tuple[str, ...], ...]
    name: str = "branches"

    @property
    def modules(self) -> frozenset[str]:
        return frozenset([*self.sources, *self.idle([])])

    def recalled(self, kept: Sequence[int]) -> list[str]:
        return [self.sources[i] for i in self._reused(kept)]

    def idle(self, kept: Sequence[int]) -> list[str]:
        return [path for i in self._reused(kept) for path in self.inside[i]]

    def _reused(self, kept: Sequence[int]) -> list[int]:
        computed = set(kept)
        return [i for i in range(self.n_groups) if i not in computed]


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

    def check_kept(self, kept: Tensor) -> None:
        super().check_kept(kept)
        if kept.tolist() != list(range(self.n_groups - max(len(kept), 1), self.n_groups)):
            raise ValueError(f"the groups kept of {self.name} must be the last ones, got {kept.tolist()[:20]}")

    def recalled(self, kept: Sequence[int]) -> list[str]:
        return [self.sources[min(kept)]] if min(kept) else []

    def idle(self, kept: Sequence[int]) -> list[str]:
        first = min(kept)
        if not first:
            return []
        inside = [path for paths in (*self.down[:first], *self.up[:first]) for path in paths]
        return [path for path in (*inside, *self.middle) if path != self.sources[first]]


PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")  # of heads, where a layer has them
AnySet = GroupSet | BlockSet | ReuseSet
REUSE_SETS = frozenset({BranchSet.name, UpLayerSet.name})


def heads_of(path: str, attention: Any) -> GroupSet:
    """Return the heads of one of diffusers' attention layers at a module path. Joint attention also has projections of
    the text, and an output projection for it."""
    heads = attention.heads
    size = attention.to_out[0].weight.shape[1] // heads
    producers = [part for part in PROJECTIONS if getattr(attention, part, None) is not None]
    consumers = ["to_out.0", *(["to_add_out"] if getattr(attention, "to_add_out", None) is not None else [])]
    return GroupSet(
        path, heads, size, tuple(f"{path}.{part}" for part in producers), tuple(f"{path}.{part}" for part in consumers),
        attention=path,
    )  # fmt: skip


def norm_across_heads(attention: Any) -> bool:
    """Return True where queries or keys are normalised over all heads together."""
    norms: list[Any] = [getattr(attention, name, None) for name in ("norm_q", "norm_k")]
    shapes = [getattr(norm, "normalized_shape", getattr(norm, "dim", ())) for norm in norms]
    return attention.heads > 1 and any(math.prod(shape) == attention.to_q.weight.shape[0] for shape in shapes)


def channels_of(path: str, ffn: Any) -> GroupSet:
    """Return the channels of one of diffusers' FFNs (`FeedForward`, or Z-Image's with three matrices) at a module
    path."""
    if hasattr(ffn, "w1"):
        return GroupSet(path, ffn.w2.weight.shape[1], 1, (f"{path}.w1", f"{path}.w3"), (f"{path}.w2",))
    return GroupSet(path, ffn.net[2].weight.shape[1], 1, (f"{path}.net.0.proj",), (f"{path}.net.2",))


def sharing(path: str, block: Any, inner: str, out: str) -> list[GroupSet]:
    """Return heads and channels of a block whose attention `attn` and FFN have one output projection together: it reads
    the heads first, then the channels.

    Args:
        path: of the block.
        block: the block.
        inner: name of the projection that makes the channels.
        out: name of the output projection.
    """
    attention = block.attn
    width, channels = attention.to_q.weight.shape[0], getattr(block, inner).weight.shape[0]
    consumers, where = (f"{path}.{out}",), f"{path}.attn"
    producers = tuple(f"{where}.{part}" for part in ("to_q", "to_k", "to_v"))
    heads = GroupSet(where, attention.heads, width // attention.heads, producers, consumers, attention=where, first=0)
    made = GroupSet(f"{path}.{inner}", channels, 1, (f"{path}.{inner}",), consumers, first=width)
    return [heads, made]


def base_of(layer: Any) -> Any:
    """Return the layer itself, without the adapters that peft has put around it."""
    return getattr(layer, "base_layer", layer)


def is_fused(attention: Any) -> bool:
    """Return True where attention reads `to_qkv`, not `to_q`, `to_k`, `to_v`; in older classes, the processor tells."""
    if not getattr(attention, "fused_projections", False):
        return False
    return isinstance(attention, AttentionModuleMixin) or "Fused" in type(attention.processor).__name__


FUSED = re.compile(r"\.to_q?kv\.")  # diffusers' fused copies of projections


def unused_copies(names: Iterable[str]) -> set[str]:
    """Return the names of parameters that fused projections left behind: copies of others that are named too."""
    found = set(names)
    return {name for name in found if (one := FUSED.sub(".to_k.", name)) != name and one in found}


PLAIN_PROCESSORS = {AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor, SlicedAttnProcessor}
"""Processors whose attention depends on its projections alone."""


class NoHeads:
    """Forward of an attention layer that has lost all its heads: only the output projection's bias is left."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = torch.zeros_like(hidden_states)
        return out if attn.to_out[0].bias is None else out + attn.to_out[0].bias
