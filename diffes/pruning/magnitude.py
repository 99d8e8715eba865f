"""Magnitude pruning: the groups with the smallest weights go first."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffes.adapters import GroupSet
from diffes.pruning.base import GroupWeights, LayerWeights, WidthMethod, nested


class Magnitude(WidthMethod):
    """Pruning by the importance of a group: the mean absolute weight of its rows in the producers and its columns in
    the consumer.

    No data is used, so every stage has the same order.
    """

    needs = "nothing"

    def prune(
        self, groups: GroupSet, weights: LayerWeights, inputs: Tensor | None, n_kept: Sequence[int]
    ) -> list[GroupWeights]:
        d_out = weights.consumer.shape[0]
        total = weights.consumer.double().abs().view(d_out, groups.n_groups, groups.size).sum((0, 2))
        count = d_out * groups.size
        for producer in weights.producers:
            # A gated FFN stacks value rows over gate rows: the first axis is 2 there and 1 elsewhere.
            rows = producer.double().abs().view(-1, groups.n_groups, groups.size * producer.shape[1])
            total = total + rows.sum((0, 2))
            count += rows.shape[0] * rows.shape[2]
        return nested(total / count, n_kept)
