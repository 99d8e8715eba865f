"""Block reuse: the least sensitive attentions and FFNs return their output of an earlier call."""

from __future__ import annotations

import torch
from torch import Tensor

from diffes.adapters import BranchSet, ModelAdapter, ReuseSet
from diffes.pruning.base import ReuseMethod


class BlockReuse(ReuseMethod):
    """Method whose level k of H reuses the fraction k / H of all attentions and FFNs; the highest level reuses all.

    Those with the least sensitivity per multiply-accumulate are reused first, ranked separately in each stage.
    """

    needs = "changes"

    def groups(self, adapter: ModelAdapter) -> BranchSet:
        return adapter.branches()

    def max_level(self, adapter: ModelAdapter) -> int:
        return min(adapter.max_level("width"), self.groups(adapter).n_groups)

    def kept(self, groups: ReuseSet, max_level: int, sensitivity: Tensor | None) -> list[Tensor]:
        if sensitivity is None:
            raise TypeError("BlockReuse.kept needs the sensitivity of each group, got None")
        order, levels = sensitivity.argsort(descending=True, stable=True), range(1, max_level + 1)
        return [order[: groups.n_kept(level, max_level)].sort().values.to(torch.int32) for level in levels]
