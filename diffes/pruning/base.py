"""Pruning methods: from the statistics of one stage to the groups that stay at every level."""

from __future__ import annotations

import abc
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffes.adapters import GroupSet, Kind, ModelAdapter, ReuseSet
from diffes.adapters.convolutions import as_matrix
from diffes.adapters.groups import Prunable
from diffes.errors import at_least
from diffes.plugins import guarded
from diffes.registry import Registry


@dataclass(frozen=True)
class GroupWeights:
    """One group set at one level of one stage.

    Args:
        kept: (n_kept,) indices of the groups that stay, rising.
        consumers: weight (d_out, n_kept * size) of each consumer where the method compensates for what was dropped;
            empty where the kept columns stay as they are.
    """

    kept: Tensor
    consumers: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return self.kept.nbytes + sum(consumer.nbytes for consumer in self.consumers)


@dataclass(frozen=True)
class LayerWeights:
    """Dense weights around one group set.

    Args:
        producers: weights (n_rows, d_in) of the producing layers; gated FFNs have twice the rows.
        consumers: weights (d_out, n_groups * size) of the consuming layers; a convolution is a matrix, too (see
            `diffes.adapters.convolutions`).
    """

    producers: tuple[Tensor, ...]
    consumers: tuple[Tensor, ...]

    @classmethod
    def of(cls, denoiser: Any, groups: GroupSet) -> LayerWeights:
        """Return the present weights of a group set, detached."""
        producers, consumers = (
            [denoiser.get_submodule(path).weight.detach() for path in paths]
            for paths in (groups.producers, groups.consumers)
        )
        matrices = (weight.flatten(1) for weight in producers if weight.dim() > 1)  # without that of a norm
        return cls(tuple(matrices), tuple(as_matrix(groups.own(weight, 1)) for weight in consumers))


@dataclass(frozen=True)
class BlockChanges:
    """Change that each block makes to its input, averaged over the tokens of one stage.

    Args:
        cosine_distance: (n_blocks,) 1 - cosine between a token before and after the block, in [0, 2].
        squared_error: (n_blocks,) mean squared difference between the two.
    """

    cosine_distance: Tensor
    squared_error: Tensor


class PruningMethod(abc.ABC):
    """Base class of methods, which decide what is removed first. A method is a class of one of the kinds below, found
    by name in `METHODS`.

    Attributes:
        kind: "width" where groups inside blocks are removed, "depth" where whole blocks are removed, "reuse" where
            nothing is removed and layers return the output of an earlier call.
        reuses: True where nothing is removed.
        needs: the statistics of a stage that the method is given; "nothing" where it needs no calibration.
    """

    kind: ClassVar[Kind]
    reuses: ClassVar[bool] = False
    needs: ClassVar[Literal["nothing", "squares", "second_moment", "blocks", "changes"]]

    def max_level(self, adapter: ModelAdapter) -> int:
        """Return H, the number of levels beside the dense one."""
        return adapter.max_level(self.kind)

    def timestep_weights(self, progress: Tensor) -> Tensor:
        """Return positive weights (n,) of calibration samples at `progress` (n,) through their stage: 0 where sampling
        enters it, 1 where it leaves it. All weights are equal unless a method overrides this."""
        return torch.ones_like(progress)


class WidthMethod(PruningMethod):
    """Base class of methods that remove heads and channels of every group set."""

    kind = "width"

    @abc.abstractmethod
    def prune(
        self, groups: GroupSet, weights: LayerWeights, inputs: Sequence[Tensor], n_kept: Sequence[int]
    ) -> list[GroupWeights]:
        """Return what is left for each of `n_kept`. Groups kept at a smaller number are kept at every larger one.

        Args:
            groups: the group set.
            weights: its dense weights.
            inputs: statistics of each consumer's inputs x in one stage, d = n_groups * size: `E[x x^T]` (d, d) where
                `needs` is "second_moment", its diagonal `E[x^2]` (d,) where it is "squares"; empty where it is
                "nothing".
            n_kept: falling numbers of groups to keep, each in [0, n_groups].
        """


class DepthMethod(PruningMethod):
    """Base class of methods that remove whole transformer blocks."""

    kind = "depth"
    needs = "blocks"

    @abc.abstractmethod
    def importance(self, changes: BlockChanges) -> Tensor:
        """Return the importance (n_blocks,) of the blocks in one stage. The least important block is removed first."""


class ReuseMethod(PruningMethod):
    """Base class of methods that choose what a call computes. The rest comes from the last call that computed it."""

    kind = "reuse"
    reuses = True

    @abc.abstractmethod
    def groups(self, adapter: ModelAdapter) -> ReuseSet:
        """Return the set of layers that may be reused.

        Raises:
            DiffesError: this model has no such layers.
        """

    @abc.abstractmethod
    def kept(self, groups: ReuseSet, max_level: int, sensitivity: Tensor | None) -> list[Tensor]:
        """Return the indices (n_kept,) of the groups that are computed at levels 1 to H. Groups computed at a level are
        computed at every lower one.

        Args:
            groups: the set of layers that may be reused.
            max_level: H.
            sensitivity: (n_groups,) where `needs` is "changes", else None: mean squared change of a prediction in one
                stage when only that group's output comes from an earlier call, divided by the multiply-accumulates of
                the group.
        """


METHODS: Registry[type[PruningMethod]] = Registry("pruning method", "diffes.pruning_methods", PruningMethod)


def pruning_method(name: str) -> Callable[[type[PruningMethod]], type[PruningMethod]]:
    """Register a subclass of `WidthMethod`, `DepthMethod` or `ReuseMethod` under a name, as a decorator; its
    constructor's parameters are its options."""
    return METHODS.register(name)


@dataclass(frozen=True)
class Sum:
    """Several methods together. Their levels follow each other, and a call is at one of them.

    Args:
        parts: the methods, at least one.
    """

    parts: tuple[PruningMethod, ...]

    @property
    def kind(self) -> str:
        """Kinds of the parts, each once, joined by "+"."""
        return "+".join(dict.fromkeys(part.kind for part in self.parts))

    @property
    def reuses(self) -> bool:
        """True where some levels reuse outputs of an earlier call."""
        return any(part.reuses for part in self.parts)

    @property
    def needs_data(self) -> bool:
        """True where a part needs calibration data."""
        return any(part.needs != "nothing" for part in self.parts)

    def max_level(self, adapter: ModelAdapter) -> int:
        """Return H, the number of levels of all parts beside the dense one."""
        total = 0
        for part in self.parts:
            what = f"max_level of pruning method {type(part).__name__}"
            with guarded(part, what, "return a whole number"):
                found = part.max_level(adapter)
            total += at_least(what, found, 1)
        return total


def parts_of(spec: str) -> list[str]:
    """Return the methods of a sum, each with its options: their texts between "+"."""
    return re.split(r"\+(?=[A-Za-z_])", spec)


def make_method(spec: str) -> Sum:
    """Build a pruning method, or several joined by "+", each with options after a colon.

    Raises:
        DiffesError: a name or an option is unknown.
    """
    return Sum(tuple(METHODS.make(part) for part in parts_of(spec)))


def check_weights(
    groups: Prunable, weights: GroupWeights, n_kept: int | None = None, outputs: Sequence[int] = ()
) -> None:
    """Check that weights fit a group set.

    Args:
        groups: the set.
        weights: what is left of it.
        n_kept: number of groups that must be kept; None where it is not known.
        outputs: number of rows that each consumer must have; empty where it is not known.

    Raises:
        ValueError: they do not fit; the message says what was expected.
    """
    kept, consumers = weights.kept, weights.consumers
    if not isinstance(kept, Tensor) or kept.ndim != 1 or kept.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"the groups kept of {groups.name} must be whole numbers in a tensor (n,)")
    groups.check_kept(kept)
    if n_kept is not None and len(kept) != n_kept:
        raise ValueError(f"{n_kept} groups of {groups.name} must be kept, got {len(kept)}")
    if not isinstance(consumers, tuple) or len(consumers) not in (0, len(groups.consumers)):
        raise ValueError(f"consumers of {groups.name} must be a tuple of {len(groups.consumers)} weights, or of none")
    for consumer, d_out in zip(consumers, outputs or itertools.repeat(None), strict=False):
        if not isinstance(consumer, Tensor):
            raise ValueError(f"a consumer of {groups.name} must be a tensor, got {type(consumer).__name__}")
        shape = (consumer.shape[0] if d_out is None and consumer.ndim else d_out, len(kept) * groups.size)
        if tuple(consumer.shape) != shape:
            raise ValueError(f"a consumer of {groups.name} must be of shape {shape}, got {tuple(consumer.shape)}")
        if not consumer.is_floating_point() or not torch.isfinite(consumer).all():
            raise ValueError(f"a consumer of {groups.name} has values that are not finite")


def nested(importance: Tensor, n_kept: Sequence[int]) -> list[GroupWeights]:
    """Return the groups of every level, without compensation: the most important of (n_groups,) stay, the first of
    equal ones."""
    order = importance.argsort(descending=True, stable=True)
    return [GroupWeights(order[:n].sort().values.to(torch.int32)) for n in n_kept]
