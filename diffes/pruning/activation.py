"""Activation pruning: the groups whose outputs are smallest go first."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffes.adapters import GroupSet
from diffes.pruning.base import GroupWeights, LayerWeights, WidthMethod, nested


class Activation(WidthMethod):
    """Pruning by the importance of a group: `||X||`, the root mean square of its outputs in the stage."""

    needs = "squares"

    def prune(
        self, groups: GroupSet, weights: LayerWeights, inputs: Tensor | None, n_kept: Sequence[int]
    ) -> list[GroupWeights]:
        if inputs is None:
            raise TypeError("Activation.prune needs the mean squares of the consumer's inputs, got None")
        return nested(inputs.double().view(groups.n_groups, groups.size).mean(1).sqrt(), n_kept)
