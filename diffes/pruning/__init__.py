"""Structured pruning of denoisers, and reuse between calls: each method in a file of its own, found in one registry."""

from diffes.pruning.base import (
    METHODS,
    BlockChanges,
    DepthMethod,
    GroupWeights,
    LayerWeights,
    PruningMethod,
    ReuseMethod,
    Sum,
    WidthMethod,
    make_method,
    parts_of,
    pruning_method,
)

__all__ = [
    "METHODS", "BlockChanges", "DepthMethod", "GroupWeights", "LayerWeights", "PruningMethod", "ReuseMethod", "Sum",
    "WidthMethod", "make_method", "parts_of", "pruning_method",
]  # fmt: skip
