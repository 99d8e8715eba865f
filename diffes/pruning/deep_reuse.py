"""Deep reuse: only the outermost layers of a U-Net are computed; their input from inside comes from an earlier call."""

from __future__ import annotations

import torch
from torch import Tensor

from diffes.adapters import ModelAdapter, ReuseSet, UpLayerSet
from diffes.errors import DiffesError
from diffes.pruning.base import ReuseMethod


class DeepReuse(ReuseMethod):
    """Method whose level r leaves out the r innermost layers of the decoder path, the middle, and the encoder layers of
    these. The highest level computes one layer of each path. Nothing is calibrated.

    Source: DeepCache, with its branch chosen call by call.
    """

    needs = "nothing"

    def groups(self, adapter: ModelAdapter) -> UpLayerSet:
        groups = adapter.up_layers()
        if groups is None:
            raise DiffesError(
                f"deep_reuse is for U-Nets, and {type(adapter.denoiser).__name__} is not one: use block_reuse"
            )
        return groups

    def max_level(self, adapter: ModelAdapter) -> int:
        return self.groups(adapter).n_groups - 1

    def kept(self, groups: ReuseSet, max_level: int, sensitivity: Tensor | None) -> list[Tensor]:
        return [torch.arange(level, groups.n_groups, dtype=torch.int32) for level in range(1, max_level + 1)]
