"""Block reuse: attentions and FFNs that change least from call to call give what they gave in an earlier call."""

from __future__ import annotations

import torch
from torch import Tensor

from diffes.adapters import BranchSet, ModelAdapter
from diffes.adapters.macs import macs_by_module
from diffes.pruning.base import ReuseMethod


class BlockReuse(ReuseMethod):
    """Level k of H reuses the same fraction k / H of all attentions and FFNs; the highest level reuses all.

    First go those that do least damage for the multiply-accumulates that they take, by a ranking of each stage's own.
    """

    needs = "changes"

    def groups(self, adapter: ModelAdapter) -> BranchSet:
        return adapter.branches()

    def max_level(self, adapter: ModelAdapter) -> int:
        return min(adapter.max_level("width"), adapter.branches().n_groups)

    def kept(self, adapter: ModelAdapter, damage: Tensor | None) -> list[Tensor]:
        if damage is None:
            raise TypeError("BlockReuse.kept needs the damage of each group, got None")
        groups, top = self.groups(adapter), self.max_level(adapter)
        counts = macs_by_module(adapter)
        price = torch.tensor([float(max(counts[path], 1)) for path in groups.branches], dtype=torch.float64)
        order = (damage.double() / price).argsort(descending=True, stable=True)
        return [order[: groups.n_kept(level, top)].sort().values.to(torch.int32) for level in range(1, top + 1)]
