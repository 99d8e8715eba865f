"""Structured pruning of denoisers: one method, one file, behind one registry."""

from diffes.pruning.base import METHODS, GroupWeights, LayerWeights, PruningMethod

__all__ = ["METHODS", "GroupWeights", "LayerWeights", "PruningMethod"]
