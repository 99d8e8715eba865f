"""OBS, the structured optimal brain surgeon: drop the cheapest group, let the others compensate, and repeat."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from diffes.adapters import GroupSet
from diffes.errors import DiffesError
from diffes.pruning.factors import Factor, FactoredMethod, LayerStatistics, pack

BLOCK = 128  # single inputs dropped between two full updates


def damped(second_moment: Tensor, damping: float) -> Tensor:
    """Return `H` in fp64 with `damping` times its mean diagonal added to the diagonal, so that it can be inverted."""
    hessian = second_moment.to(torch.float64, copy=True)
    hessian.diagonal().add_(damping * hessian.diagonal().mean().clamp_min(1e-12))
    return hessian


class OBS(FactoredMethod):
    """Method that drops groups one at a time with exact compensation.

    With `H = E[x x^T]`, the group g of least loss `tr(W_g (H^-1_gg)^-1 W_g^T)` is dropped, the rest is updated by
    `W -= W_g (H^-1_gg)^-1 H^-1_g,:` and `H^-1` is down-dated. The weights left at any point are the least-squares
    optimum `W H[:,K] H[K,K]^-1` of the kept inputs K. Of a set with several consumers, each has a W and an H, and the
    loss of a group is the sum over them.

    Args:
        damping: fraction of the mean diagonal of H that is added to the diagonal.
        weighting: "uniform", or "log": the weight of a sample in H falls logarithmically from 1 at the start of the
            stage to 1/2 at its end, because an early error is carried through all later steps.

    Source: Hassibi and Stork 1993 for single weights; grouped as in ZipLM. The weighting follows OBS-Diff, where it
        falls over the whole trajectory; here stages are calibrated separately, so it falls inside each stage.
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

    def factors(self, layers: Iterable[LayerStatistics]) -> Iterator[Factor]:
        waiting = iter(layers)
        for first in waiting:
            part = [first, *itertools.islice(waiting, _at_once(first.weights.consumers) - 1)]
            inverses = torch.stack([self._inverse(each.groups, moment) for each in part for moment in each.inputs])
            dense = torch.stack([weight for each in part for weight in each.weights.consumers])
            dtype, groups, n = dense.dtype, first.groups, len(first.groups.consumers)
            wide = torch.promote_types(dtype, torch.float32)
            order, rows = eliminate(groups, dense.to(torch.float64, copy=True), inverses, wide)
            del inverses, dense
            for each, gone, of_consumers in zip(part, order[::n], rows.unflatten(0, (-1, n)), strict=True):
                packed = tuple(pack(row[:, groups.features(gone)], dtype) for row in of_consumers)
                yield Factor(each.groups, gone.to("cpu", torch.int32), packed)

    def _inverse(self, groups: GroupSet, second_moment: Tensor) -> Tensor:
        """Return `H^-1` (d, d) of one consumer, in fp64."""
        triangle, failed = torch.linalg.cholesky_ex(damped(second_moment, self.damping))
        if failed:
            raise DiffesError(
                f"the second moment of {groups.name} is not positive definite with damping {self.damping}: choose a "
                "larger damping, up to 1"
            )
        return torch.cholesky_inverse(triangle)


def _at_once(consumers: Sequence[Tensor]) -> int:
    """Return how many sets are eliminated side by side: on a GPU, where launches cost time, as many as half of its free
    memory takes; on a CPU, one."""
    weight = consumers[0]
    if weight.device.type != "cuda":
        return 1
    d_out, d = weight.shape
    nbytes = 8 * d * (2 * d + 2 * d_out) * len(consumers)
    return max(1, torch.cuda.mem_get_info(weight.device)[0] // (2 * nbytes))


def eliminate(groups: GroupSet, weight: Tensor, inverse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Drop all groups of sets of one shape, cheapest first, in each set separately. Layers are the consumers, those of
    one set next to each other; they drop the same groups.

    Groups of one input are dropped in blocks: their order is found first, then `W` and `H^-1` are each updated by one
    matrix product.

    Args:
        groups: the set, or one of the same shape.
        weight: (layers, d_out, d) fp64 consumer weights, overwritten.
        inverse: (layers, d, d) fp64 `H^-1`, overwritten.
        dtype: of the rows.

    Returns:
        Indices (layers, n_groups) of the groups, in the order of dropping; and, in that order, rows (layers, d, d) of
        `H^-1` at the time over its diagonal: what dropping an input takes from the others, in units of its own weights.
        Columns are in the order of the layer; those of inputs dropped before carry no meaning.
    """
    n_consumers = len(groups.consumers)
    every = torch.arange(len(weight), device=weight.device)[:, None]
    left = torch.arange(groups.n_groups, device=weight.device).repeat(len(weight), 1)
    rows = torch.zeros(inverse.shape, dtype=dtype, device=weight.device)
    order = torch.empty_like(left)
    done = 0
    while left.shape[1]:
        if groups.size == 1:
            dropped, taken = cheapest_inputs(weight, inverse, min(BLOCK, left.shape[1]), n_consumers)
        else:
            dropped = _cheapest(elimination_loss(weight, inverse, groups.size), n_consumers)[:, None]
        gone = torch.stack([groups.features(each) for each in dropped])
        ours, weight_columns = inverse[every, gone], weight.mT[every, gone].mT
        inverse_columns = inverse.mT[every, gone].mT
        corner = ours.gather(2, gone[:, None].expand(-1, gone.shape[1], -1))
        factor = torch.linalg.solve(corner, ours)  # (H^-1_DD)^-1 H^-1_D,: of both updates
        order[:, done : done + dropped.shape[1]] = left.gather(1, dropped)
        found = taken if groups.size == 1 else factor
        places = torch.stack([groups.features(each) for each in left])[:, None].expand(found.shape)
        rows[:, done * groups.size :][:, : gone.shape[1]].scatter_(2, places, found.to(dtype))
        done += dropped.shape[1]
        # The last groups left move to the places of the dropped ones, so that nothing else has to be copied.
        n_left = left.shape[1] - dropped.shape[1]
        alive = torch.ones_like(left, dtype=torch.bool).scatter_(1, dropped, False)
        n = n_left * groups.size
        for i in range(len(weight)):
            to = (~alive[i, :n_left]).nonzero()[:, 0]
            origin = alive[i, n_left:].nonzero()[:, 0] + n_left
            _move(left[i], origin, to)
            to, origin = groups.features(to), groups.features(origin)
            for moved in (factor[i].T, weight[i].T, inverse[i], inverse[i].T, inverse_columns[i]):
                _move(moved, origin, to)
            weight[i, :, :n].addmm_(weight_columns[i], factor[i, :, :n], alpha=-1)
            inverse[i, :n, :n].addmm_(inverse_columns[i, :n], factor[i, :, :n], alpha=-1)
        left, weight, inverse = left[:, :n_left], weight[:, :, :n], inverse[:, :n, :n]
    return order, rows


def _cheapest(loss: Tensor, n_consumers: int) -> Tensor:
    """Return the index (layers,) of the least loss, of losses (layers, n) summed over the consumers of each set."""
    return loss.unflatten(0, (-1, n_consumers)).sum(1).argmin(1).repeat_interleave(n_consumers)


def cheapest_inputs(weight: Tensor, inverse: Tensor, count: int, n_consumers: int = 1) -> tuple[Tensor, Tensor]:
    """Return the next inputs to drop in each layer, without changing `W` and `H^-1`.

    The loss of input i is `S_ii / H^-1_ii` with `S = W^T W`. Dropping g subtracts `H^-1_gg f f^T` from `H^-1` and
    `f u^T + u f^T` from `S`, with `f = H^-1_g / H^-1_gg` and `u = S_g - S_gg f / 2`. So only the diagonals are kept up
    to date. A present row is the row from before all drops, less what the `f` and `u` found since subtract from it.

    Args:
        weight: (layers, d_out, d).
        inverse: (layers, d, d) `H^-1`.
        count: number of inputs to drop, at most d.
        n_consumers: number of layers, next to each other, that drop the same inputs.

    Returns:
        Indices (layers, count) in the order of greedy elimination, and the f (layers, count, d) of each.
    """
    n_layers, _, d = weight.shape
    every = torch.arange(n_layers, device=weight.device)
    diagonal, squares = inverse.diagonal(dim1=1, dim2=2).clone(), weight.square().sum(1)
    alive = torch.ones_like(diagonal, dtype=torch.bool)
    f, u = weight.new_empty(n_layers, count, d), weight.new_empty(n_layers, count, d)
    pivots = weight.new_empty(n_layers, count)
    # rows of S of the inputs likely to be dropped, by one product; reading W for each takes longer
    likely = (squares / diagonal).topk(min(2 * count, d), largest=False).indices
    products = weight.mT[every[:, None], likely] @ weight
    place = torch.full_like(diagonal, -1, dtype=torch.long)
    place.scatter_(1, likely, torch.arange(likely.shape[1], device=weight.device).expand_as(likely))
    order = []
    for k in range(count):
        g = _cheapest(torch.where(alive, squares / diagonal, torch.inf), n_consumers)
        known = place[every, g]
        row = products[every, known] if bool((known >= 0).all()) else _times(weight[every, :, g], weight)
        f_g, pivot = f[every, :k, g], diagonal[every, g]
        pivots[:, k] = pivot
        f[:, k] = (inverse[every, g] - _times(pivots[:, :k] * f_g, f[:, :k])) / pivot[:, None]
        u[:, k] = row - _times(f_g, u[:, :k]) - _times(u[every, :k, g], f[:, :k])
        u[:, k] -= squares[every, g, None] / 2 * f[:, k]
        diagonal -= pivot[:, None] * f[:, k].square()
        squares -= 2 * f[:, k] * u[:, k]
        alive[every, g] = False
        order.append(g)
    return torch.stack(order, 1), f


def _times(vectors: Tensor, matrices: Tensor) -> Tensor:
    """Return the products (layers, d) of vectors (layers, k) with matrices (layers, k, d)."""
    return (vectors[:, None] @ matrices)[:, 0]


def elimination_loss(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """Return `tr(W_g (H^-1_gg)^-1 W_g^T)` (layers, n_groups): the added squared error if a group went next."""
    blocks = inverse.unflatten(1, (-1, size)).unflatten(3, (-1, size)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    columns = weight.unflatten(2, (-1, size)).permute(0, 2, 3, 1)  # (layers, n_groups, size, d_out)
    return torch.linalg.solve(blocks, columns @ columns.mT).diagonal(dim1=2, dim2=3).sum(2)


def _move(tensor: Tensor, origin: Tensor, to: Tensor) -> None:
    """Copy entries of the first dimension from the places `origin` to the places `to`."""
    tensor[to] = tensor[origin]  # index_select would copy the whole of a view
