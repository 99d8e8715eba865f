"""Layer drop: the transformer blocks that change their input least are skipped first, ranked in each stage."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from diffes.errors import DiffesError
from diffes.pruning.base import BlockChanges, DepthMethod


class LayerDrop(DepthMethod):
    """Method that skips blocks.

    Args:
        importance: "cosine", 1 - cosine between a block's input and output, or "mse", their mean squared difference.
    """

    def __init__(self, importance: Literal["cosine", "mse"] = "cosine") -> None:
        if importance not in ("cosine", "mse"):
            raise DiffesError(f"importance of layer_drop must be cosine or mse, got {importance!r}")
        self.measure = importance

    def importance(self, changes: BlockChanges) -> Tensor:
        return changes.cosine_distance if self.measure == "cosine" else changes.squared_error
