"""Magnitude pruning: the groups with the smallest weights go first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffes.adapters import GroupSet
from diffes.pruning.base import GroupWeights, LayerWeights, WidthMethod, nested


class Magnitude(WidthMethod):
    """Pruning by the importance of a group: the mean absolute weight of its rows in the producers and its columns in
    the consumers.

    No data is used, so every stage has the same order.
    """

    needs = "nothing"

    def prune(
        self, groups: GroupSet, weights: LayerWeights, inputs: Sequence[Tensor], n_kept: Sequence[int]
    ) -> list[GroupWeights]:
        parts = [consumer.view(-1, groups.n_groups, groups.size) for consumer in weights.consumers]
        # A gated FFN stacks value rows over gate rows: the first axis is 2 there and 1 elsewhere.
        parts += [p.view(-1, groups.n_groups, groups.size * p.shape[1]) for p in weights.producers]
        total, count = torch.zeros((), dtype=torch.float64, device=parts[0].device), 0
        for part in parts:
            total = total + part.double().abs().sum((0, 2))
            count += part.shape[0] * part.shape[2]
        return nested(total / count, n_kept)
