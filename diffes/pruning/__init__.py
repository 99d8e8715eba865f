"""Structured pruning of denoisers: one method, one file, behind one registry."""

from diffes.pruning.base import (
    METHODS,
    BlockChanges,
    DepthMethod,
    GroupWeights,
    LayerWeights,
    PruningMethod,
    WidthMethod,
)

__all__ = ["METHODS", "BlockChanges", "DepthMethod", "GroupWeights", "LayerWeights", "PruningMethod", "WidthMethod"]
