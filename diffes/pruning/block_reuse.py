"""Block reuse: attentions and FFNs that change least from call to call give what they gave in an earlier call."""

from __future__ import annotations

import torch
from torch import Tensor

from diffes.adapters import BranchSet, ModelAdapter, ReuseSet
from diffes.pruning.base import ReuseMethod


class BlockReuse(ReuseMethod):
    """Level k of H reuses the same fraction k / H of all attentions and FFNs; the highest level reuses all.

    First go those that do least damage for the multiply-accumulates that they take, by a ranking of each stage's own.
    """

    needs = "changes"

    def groups(self, adapter: ModelAdapter) -> BranchSet:
        return adapter.branches()

    def max_level(self, adapter: ModelAdapter) -> int:
        return min(adapter.max_level("width"), self.groups(adapter).n_groups)

    def kept(self, groups: ReuseSet, max_level: int, harm: Tensor | None) -> list[Tensor]:
        if harm is None:
            raise TypeError("BlockReuse.kept needs the harm of each group, got None")
        order, levels = harm.argsort(descending=True, stable=True), range(1, max_level + 1)
        return [order[: groups.n_kept(level, max_level)].sort().values.to(torch.int32) for level in levels]
