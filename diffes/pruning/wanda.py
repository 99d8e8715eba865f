"""Wanda: weights times activations, without compensation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffes.adapters import GroupSet
from diffes.pruning.base import GroupWeights, LayerWeights, WidthMethod, nested


class Wanda(WidthMethod):
    """Pruning by the importance of a group: the sum of `|W_ij| * ||X_j||` over its columns j in the consumer.

    Source: Sun et al. 2023 score single weights so; here their scores are summed over a group.
    """

    needs = "squares"

    def prune(
        self, groups: GroupSet, weights: LayerWeights, inputs: Tensor | None, n_kept: Sequence[int]
    ) -> list[GroupWeights]:
        if inputs is None:
            raise TypeError("Wanda.prune needs the mean squares of the consumer's inputs, got None")
        scores = weights.consumer.double().abs().sum(0) * inputs.double().sqrt()
        return nested(scores.view(groups.n_groups, groups.size).sum(1), n_kept)
