"""What a pruning method is: a function from one group set's weights to the thin weights of every level."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffes.adapters.base import GroupSet
from diffes.registry import Registry


@dataclass(frozen=True)
class GroupWeights:
    """One group set at one level of one stage.

    Args:
        kept: (n_kept,) indices of the groups that stay, rising.
        consumer: (d_out, n_kept * size) weight of the consumer where the method compensates for what was dropped; None
            where the kept columns stay as they are.
    """

    kept: Tensor
    consumer: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return self.kept.nbytes + (self.consumer.nbytes if self.consumer is not None else 0)


@dataclass(frozen=True)
class LayerWeights:
    """Dense weights around one group set.

    Args:
        producers: weights (n_rows, d_in) of the producing layers; gated FFNs have twice the rows.
        consumer: weight (d_out, n_groups * size) of the consuming layer.
    """

    producers: tuple[Tensor, ...]
    consumer: Tensor

    @classmethod
    def of(cls, denoiser: Any, groups: GroupSet) -> LayerWeights:
        """The present weights of a group set, detached."""
        return cls(
            tuple(denoiser.get_submodule(path).weight.detach() for path in groups.producers),
            denoiser.get_submodule(groups.consumer).weight.detach(),
        )


class PruningMethod(abc.ABC):
    """Decides which groups go first and how the rest makes up for them.

    Attributes:
        kind: "width" where groups inside blocks go.
        needs_inputs: whether `prune` wants the second moment of the consumer's inputs, and so calibration.
    """

    kind: ClassVar[str] = "width"
    needs_inputs: ClassVar[bool]

    @abc.abstractmethod
    def prune(
        self, groups: GroupSet, weights: LayerWeights, second_moment: Tensor | None, n_kept: Sequence[int]
    ) -> list[GroupWeights]:
        """Thin weights for each of `n_kept`, nested: what is kept at a smaller number is kept at every larger one.

        Args:
            groups: the group set.
            weights: its dense weights.
            second_moment: (d, d) `E[x x^T]` of the consumer's inputs in one stage, d = n_groups * size; None where
                `needs_inputs` is False.
            n_kept: falling numbers of groups to keep, each in [0, n_groups].
        """


METHODS: Registry[type[PruningMethod]] = Registry("pruning method", "diffes.pruning_methods")


def nested(order: Tensor, n_kept: Sequence[int]) -> list[GroupWeights]:
    """Levels without compensation from one order (n_groups,), most important first."""
    return [GroupWeights(order[:n].sort().values.to(torch.int32)) for n in n_kept]
