"""OBS, the structured optimal brain surgeon: the cheapest group goes, the others make up for it, and so on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from diffes.adapters import GroupSet
from diffes.errors import DiffesError
from diffes.pruning.base import GroupWeights, LayerWeights, WidthMethod


def damped(second_moment: Tensor, damping: float) -> Tensor:
    """`H` in fp64 with `damping` times its mean diagonal added to the diagonal, so that it can be inverted."""
    hessian = second_moment.double()
    extra = damping * hessian.diagonal().mean().clamp_min(1e-12)
    return hessian + extra * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)


class OBS(WidthMethod):
    """Drops groups one at a time with exact compensation.

    With `H = E[x x^T]`, the group g of least loss `tr(W_g (H^-1_gg)^-1 W_g^T)` goes, the rest is updated by
    `W -= W_g (H^-1_gg)^-1 H^-1_g,:` and `H^-1` is down-dated. The weights left at any point are the least-squares
    optimum `W H[:,K] H[K,K]^-1` of the kept inputs K.

    Args:
        damping: fraction of the mean diagonal of H added to it.
        weighting: "uniform", or "log": H counts a sample less the later in the stage its timestep comes, falling
            logarithmically from 1 to 1/2, because an early error is carried through all steps after it.

    Source: Hassibi and Stork 1993 for single weights; grouped as in ZipLM. The weighting follows OBS-Diff, which lets
        it fall over the whole trajectory; stages are calibrated apart here, so it falls inside each.
    """

    needs = "second_moment"

    def __init__(self, damping: float = 0.01, weighting: Literal["uniform", "log"] = "uniform") -> None:
        if not (isinstance(damping, int | float) and 0 < damping <= 1):
            raise DiffesError(f"damping of obs must be in (0, 1], got {damping!r}")
        if weighting not in ("uniform", "log"):
            raise DiffesError(f"weighting of obs must be uniform or log, got {weighting!r}")
        self.damping = damping
        self.weighting = weighting

    def timestep_weights(self, progress: Tensor) -> Tensor:
        if self.weighting == "uniform":
            return torch.ones_like(progress)
        return 1 - 0.5 * torch.log1p((math.e - 1) * progress)

    def prune(
        self, groups: GroupSet, weights: LayerWeights, inputs: Tensor | None, n_kept: Sequence[int]
    ) -> list[GroupWeights]:
        if inputs is None:
            raise TypeError("OBS.prune needs the second moment of the consumer's inputs, got None")
        inverse = torch.linalg.inv(damped(inputs, self.damping))
        weight = weights.consumer.double().clone()
        groups_left = torch.arange(groups.n_groups, device=weight.device)
        thin = []
        for n in n_kept:
            groups_left, weight, inverse = eliminate(groups_left, weight, inverse, groups.size, n)
            # a copy, also of an fp64 model's: what is left goes on being overwritten
            consumer = weight.to(weights.consumer.dtype, copy=True)
            thin.append(GroupWeights(groups_left.to(torch.int32), consumer))
        return thin


def eliminate(
    groups_left: Tensor, weight: Tensor, inverse: Tensor, size: int, n_kept: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Drops groups one by one until `n_kept` are left.

    Args:
        groups_left: (n,) indices of the groups still there.
        weight: (d_out, n * size) fp64 consumer weight, overwritten.
        inverse: (n * size, n * size) fp64 `H^-1`, overwritten by its down-dates.
        size: consumer inputs per group.
        n_kept: when to stop.

    Returns:
        The three tensors without what was dropped.
    """
    n = len(groups_left)
    alive = torch.ones(n, dtype=torch.bool, device=weight.device)
    for _ in range(n - n_kept):
        loss = elimination_loss(weight, inverse, n, size)
        group = int(torch.where(alive, loss, torch.inf).argmin())
        span = slice(group * size, (group + 1) * size)
        factor = torch.linalg.solve(inverse[span, span], inverse[span])  # (H^-1_gg)^-1 H^-1_g,: of both updates
        weight.addmm_(weight[:, span].clone(), factor, alpha=-1)
        inverse.addmm_(inverse[:, span].clone(), factor, alpha=-1)
        # The row and column of a dropped group are zero now up to rounding; the identity keeps its block invertible.
        inverse[span] = inverse[:, span] = weight[:, span] = 0
        inverse[span, span] = torch.eye(size, dtype=inverse.dtype, device=inverse.device)
        alive[group] = False
    columns = alive.repeat_interleave(size)
    return groups_left[alive], weight[:, columns], inverse[columns][:, columns]


def elimination_loss(weight: Tensor, inverse: Tensor, n_groups: int, size: int) -> Tensor:
    """(n_groups,) `tr(W_g (H^-1_gg)^-1 W_g^T)`: added squared error if a group went next."""
    if size == 1:
        return weight.square().sum(0) / inverse.diagonal()
    blocks = inverse.view(n_groups, size, n_groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = weight.view(-1, n_groups, size).permute(1, 2, 0)  # (n_groups, size, d_out)
    return (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))
