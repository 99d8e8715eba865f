"""OBS, the structured optimal brain surgeon: the cheapest group goes, the others make up for it, and so on."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from diffes.adapters import GroupSet
from diffes.errors import DiffesError
from diffes.pruning.base import LayerWeights
from diffes.pruning.factors import Factor, FactoredMethod, pack

BLOCK = 128  # single inputs dropped between two full updates


def damped(second_moment: Tensor, damping: float) -> Tensor:
    """`H` in fp64 with `damping` times its mean diagonal added to the diagonal, so that it can be inverted."""
    hessian = second_moment.to(torch.float64, copy=True)
    hessian.diagonal().add_(damping * hessian.diagonal().mean().clamp_min(1e-12))
    return hessian


class OBS(FactoredMethod):
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

    def factor(self, groups: GroupSet, weights: LayerWeights, inputs: Tensor | None) -> Factor:
        if inputs is None:
            raise TypeError("OBS.factor needs the second moment of the consumer's inputs, got None")
        triangle, failed = torch.linalg.cholesky_ex(damped(inputs, self.damping))
        if failed:
            raise DiffesError(
                f"the second moment of {groups.name} is not positive definite with damping {self.damping}: try more"
            )
        inverse = torch.cholesky_inverse(triangle)
        del triangle
        dtype = weights.consumer.dtype
        order, rows = eliminate(
            groups, weights.consumer.to(torch.float64, copy=True), inverse, torch.promote_types(dtype, torch.float32)
        )
        return Factor(groups, order.to("cpu", torch.int32), pack(rows[:, groups.features(order)], dtype))


def eliminate(groups: GroupSet, weight: Tensor, inverse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Drops all groups, cheapest first.

    Groups of one input go in blocks: their order is found first, then one matrix product each updates `W` and `H^-1`.

    Args:
        groups: the set.
        weight: (d_out, d) fp64 consumer weight, overwritten.
        inverse: (d, d) fp64 `H^-1`, overwritten.
        dtype: of the rows.

    Returns:
        (n_groups,) indices of the groups, the first one dropped first; and rows (d, d), in that order, of `H^-1` at the
        time over its diagonal: what dropping an input takes from the others in units of its own weights. Columns are in
        the order of the layer, those of inputs that went before are not to be looked at.
    """
    left = torch.arange(groups.n_groups, device=weight.device)
    rows = torch.zeros(inverse.shape, dtype=dtype, device=weight.device)
    order = torch.empty_like(left)
    done = 0
    while len(left):
        if groups.size == 1:
            dropped, taken = cheapest_inputs(weight, inverse, min(BLOCK, len(left)))
        else:
            dropped = elimination_loss(weight, inverse, groups.size).argmin(0, keepdim=True)
        gone = groups.features(dropped)
        ours, weight_columns, inverse_columns = inverse[gone], weight[:, gone], inverse[:, gone]
        factor = torch.linalg.solve(ours[:, gone], ours)  # (H^-1_DD)^-1 H^-1_D,: of both updates
        order[done : done + len(dropped)] = left[dropped]
        found = taken if groups.size == 1 else factor
        rows[done * groups.size :][: len(gone), groups.features(left)] = found.to(dtype)
        done += len(dropped)
        # The last ones left move to the places of the dropped ones, so that nothing else has to be copied.
        n_left = len(left) - len(dropped)
        alive = torch.ones_like(left, dtype=torch.bool)
        alive[dropped] = False
        to = (~alive[:n_left]).nonzero()[:, 0]
        origin = alive[n_left:].nonzero()[:, 0] + n_left
        left = _moved(left, 0, origin, to, n_left)
        to, origin, n_left = groups.features(to), groups.features(origin), n_left * groups.size
        factor = _moved(factor, 1, origin, to, n_left)
        weight = _moved(weight, 1, origin, to, n_left)
        inverse = _moved(_moved(inverse, 0, origin, to, n_left), 1, origin, to, n_left)
        weight.addmm_(weight_columns, factor, alpha=-1)
        inverse.addmm_(_moved(inverse_columns, 0, origin, to, n_left), factor, alpha=-1)
    return order, rows


def cheapest_inputs(weight: Tensor, inverse: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The next inputs to go, without touching `W` and `H^-1`.

    The loss of input i is `S_ii / H^-1_ii` with `S = W^T W`. Dropping g takes `H^-1_gg f f^T` from `H^-1` and
    `f u^T + u f^T` from `S`, with `f = H^-1_g / H^-1_gg` and `u = S_g - S_gg f / 2`. So the diagonals are kept up to
    date, and a row is the one from before all drops less what the `f` and `u` since took from it.

    Args:
        weight: (d_out, d).
        inverse: (d, d) `H^-1`.
        count: how many, at most d.

    Returns:
        (count,) indices, in the order of greedy elimination, and the f (count, d) of each.
    """
    diagonal, squares = inverse.diagonal().clone(), weight.square().sum(0)
    alive = torch.ones_like(diagonal, dtype=torch.bool)
    f, u = weight.new_empty(count, len(diagonal)), weight.new_empty(count, len(diagonal))
    pivots = weight.new_empty(count)
    # rows of S of those likely to go, by one product; reading W for each takes longer
    likely = (squares / diagonal).topk(min(2 * count, len(diagonal)), largest=False).indices
    rows = dict(zip(likely.tolist(), weight[:, likely].T @ weight, strict=True))
    order = []
    for k in range(count):
        g = int(torch.where(alive, squares / diagonal, torch.inf).argmin())
        row = rows[g] if g in rows else weight[:, g] @ weight
        f_g = f[:k, g]
        pivots[k] = diagonal[g]
        f[k] = (inverse[g] - (pivots[:k] * f_g) @ f[:k]) / pivots[k]
        u[k] = row - f_g @ u[:k] - u[:k, g] @ f[:k] - (squares[g] / 2) * f[k]
        diagonal -= pivots[k] * f[k].square()
        squares -= 2 * f[k] * u[k]
        alive[g] = False
        order.append(g)
    return torch.tensor(order, device=weight.device), f


def elimination_loss(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """(n_groups,) `tr(W_g (H^-1_gg)^-1 W_g^T)`: added squared error if a group went next."""
    blocks = inverse.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = weight.unflatten(1, (-1, size)).permute(1, 2, 0)  # (n_groups, size, d_out)
    return torch.linalg.solve(blocks, columns @ columns.mT).diagonal(dim1=1, dim2=2).sum(1)


def _moved(tensor: Tensor, dim: int, origin: Tensor, to: Tensor, length: int) -> Tensor:
    """The first `length` places of a dimension, once what stood at `origin` is moved to `to`; overwrites."""
    view = tensor.transpose(0, dim)
    view[to] = view[origin]  # index_select would copy the whole of a view
    return tensor.narrow(dim, 0, length)
