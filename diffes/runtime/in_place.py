"""Dense tensors whose rows change places in their own memory: a pruned tensor is then their first rows, and no copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from diffes.errors import DiffesError


class Held:
    """A parameter of a layer, and its dense tensor.

    Attributes:
        device: device on which the layer computes.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        if name not in layer._parameters:
            raise DiffesError(
                f"the {name} of {type(layer).__name__} is no plain parameter, so it cannot be cut to pruned layers; "
                "load the pipeline without what computes it"
            )
        self.layer = layer
        self.name = name
        self.parameter = cast(nn.Parameter, layer._parameters[name])
        self.dense = self.parameter.data
        self.device = self.dense.device

    def put_away(self) -> None:
        """Move the dense tensor into host memory until it is needed. Does nothing where it is there already."""
        if self.dense.is_cuda:
            self.dense = torch.empty_like(self.dense, device="cpu", pin_memory=True).copy_(self.dense)

    def put_back(self) -> None:
        """Move the dense tensor to the device again."""
        self.dense = self.dense.to(self.device)

    def is_part(self) -> bool:
        """Return True where the parameter is now some rows of the dense tensor's memory."""
        now, then = self.parameter, self.dense
        return len(now) != len(then) and _memory(now) == _memory(then)


@dataclass
class _Move:
    """Change of order in progress.

    Args:
        order: the group at each place afterwards.
        start: the first place whose group changes.
        sources: earlier places of the groups from `start` on, up to the last place that changes.
        taken: number of the tensor being written to, and the rows copied out of it; the tensors before it are done.
    """

    order: np.ndarray[Any, np.dtype[np.int64]]
    start: int
    sources: Tensor
    taken: tuple[int, Tensor | None] = (-1, None)


class InPlace:
    """Tensors whose groups of rows share one order. The order changes without a second copy of more than one tensor.

    Rows that move are copied out of a tensor before anything is written to it, and kept until the next tensor's turn.
    After an interruption, they are written once more, and the rest follows, the next time an order is requested.

    Args:
        held: the tensors, each with memory of its own.
        n_groups: of the set.
        layers: number of layers of rows: in a tensor of two, the rows of gate i lie `n_groups` groups below those of
            value i.

    Attributes:
        modules: those that the tensors belong to.
    """

    def __init__(self, held: Sequence[Held], n_groups: int, layers: int) -> None:
        self._held = held
        self.modules = [each.layer for each in held]
        self._n_groups, self._layers = n_groups, layers
        self._order = np.arange(n_groups * layers)  # number of the group at each place, layer by layer
        self._move: _Move | None = None

    def dense(self) -> None:
        """Put all rows back to their dense places."""
        self.first(np.arange(self._n_groups))

    def first(self, groups: np.ndarray[Any, Any]) -> list[Tensor]:
        """Move the rows of some groups, in their order, layer by layer, to the front of each tensor; return them."""
        self._finish()
        kept = np.concatenate([groups + layer * self._n_groups for layer in range(self._layers)])
        order, n = self._order.copy(), len(kept)
        stays = np.zeros(len(order), bool)
        stays[kept] = True
        stays = stays[order]  # by place
        order[n:][stays[n:]] = order[:n][~stays[:n]]
        order[:n] = kept
        changes = np.flatnonzero(order != self._order)
        if len(changes):
            start, stop = changes[0], changes[-1] + 1
            places = np.empty_like(order)
            places[self._order] = np.arange(len(order))
            self._move = _Move(order, start, torch.from_numpy(places[order[start:stop]]).to(self._held[0].device))
            self._finish()
        n_rows = self._held[0].dense.shape[0] // len(order) * n
        return [held.dense.narrow(0, 0, n_rows) for held in self._held]

    def _finish(self) -> None:
        """Finish a move from the point where it was interrupted."""
        move = self._move
        if move is None:
            return
        for i, held in enumerate(self._held):
            rows = held.dense.view(len(move.order), -1)
            if i > move.taken[0]:
                move.taken = i, rows.index_select(0, move.sources)
            at, taken = move.taken
            if i == at and taken is not None:
                rows.narrow(0, move.start, taken.shape[0]).copy_(taken)
        self._order = move.order
        self._move = None


def in_place(
    held: Sequence[Held], others: Sequence[Held], n_groups: int, size: int, alone: frozenset[int]
) -> InPlace | None:
    """Return the mover of the rows of a group set's producers.

    Args:
        held: their tensors.
        others: tensors around the set that are put away while it is pruned.
        n_groups: of the set.
        size: rows of a group.
        alone: start addresses of memory that may be written to (see `unshared`).

    Returns:
        None where a tensor shares its memory, or not all have the same rows in one place: then pruned layers are
        copies.
    """
    n_rows = len(held[0].dense)
    alike = all(len(each.dense) == n_rows and each.device == held[0].device for each in held)
    own = all(_memory(each.dense) in alone for each in (*held, *others))
    if not alike or not own or n_rows % (n_groups * size):
        return None
    return InPlace(held, n_groups, n_rows // (n_groups * size))


def unshared(model: nn.Module) -> frozenset[int]:
    """Return the start addresses of memory that only one tensor of a model uses, under one name, in one process."""
    modules = [module for _, module in model.named_modules(remove_duplicate=False)]
    found = [each for m in modules for each in (*m._parameters.values(), *m._buffers.values()) if each is not None]
    uses = Counter(map(_memory, found))
    return frozenset(
        _memory(each)
        for each in found
        if uses[_memory(each)] == 1
        and each.is_contiguous()
        and each.untyped_storage().nbytes() == each.nbytes
        and not each.is_inference()  # may not be written to
        and not (each.device.type == "cpu" and each.is_shared())
    )


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def streamed(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of a bank on a device. For a GPU, the tensor's host memory is pinned from then on, and only the
    GPU's next computations wait for the copy."""
    if device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
        tensor.data = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def copied(module: nn.Module, weights: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Copy a layer's tensors in a `state_dict`, as a hook, so that they stay as they are when rows move."""
    for name in module._parameters:
        tensor = weights.get(prefix + name)
        if tensor is not None and not isinstance(tensor, nn.Parameter):  # with `keep_vars` it is the parameter itself
            weights[prefix + name] = tensor.clone()
