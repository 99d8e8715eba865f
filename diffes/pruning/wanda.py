"""Wanda: weights times activations, without compensation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffes.adapters import GroupSet
from diffes.pruning.base import GroupWeights, LayerWeights, WidthMethod, nested


class Wanda(WidthMethod):
    """Pruning by the importance of a group: the sum of `|W_ij| * ||X_j||` over its columns j in the consumers.

    Source: Sun et al. 2023 score single weights so; here their scores are summed over a group.
    """

    needs = "squares"

    def prune(
        self, groups: GroupSet, weights: LayerWeights, inputs: Sequence[Tensor], n_kept: Sequence[int]
    ) -> list[GroupWeights]:
        by_consumer = [
            consumer.double().abs().sum(0) * squares.double().sqrt()
            for consumer, squares in zip(weights.consumers, inputs, strict=True)
        ]
        scores = torch.stack(by_consumer).sum(0)
        return nested(scores.view(groups.n_groups, groups.size).sum(1), n_kept)
