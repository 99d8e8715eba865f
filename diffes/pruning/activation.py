"""Activation pruning: the groups whose outputs are smallest go first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffes.adapters import GroupSet
from diffes.pruning.base import GroupWeights, LayerWeights, WidthMethod, nested


class Activation(WidthMethod):
    """Pruning by the importance of a group: `||X||`, the root mean square of its outputs in the stage."""

    needs = "squares"

    def prune(
        self, groups: GroupSet, weights: LayerWeights, inputs: Sequence[Tensor], n_kept: Sequence[int]
    ) -> list[GroupWeights]:
        squares = torch.stack([each.double().view(groups.n_groups, groups.size).mean(1) for each in inputs])
        return nested(squares.sum(0).sqrt(), n_kept)
