"""Rows of dense tensors that change places in their own memory: a thin tensor is then their first rows, and no copy."""

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
        device: where the layer computes.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        if name not in layer._parameters:
            raise DiffesError(
                f"the {name} of {type(layer).__name__} is no plain parameter, so it cannot be cut to thin layers; load "
                "the pipeline without what computes it"
            )
        self.layer = layer
        self.name = name
        self.parameter = cast(nn.Parameter, layer._parameters[name])
        self.dense = self.parameter.data
        self.device = self.dense.device

    def put_away(self) -> None:
        """Moves the dense tensor into host memory, where it waits until it is needed; nothing where it lies there."""
        if self.dense.is_cuda:
            self.dense = torch.empty_like(self.dense, device="cpu", pin_memory=True).copy_(self.dense)

    def put_back(self) -> None:
        """Moves it to the device again."""
        self.dense = self.dense.to(self.device)

    def is_part(self) -> bool:
        """Whether the parameter is now some rows of the dense tensor's memory."""
        now, then = self.parameter, self.dense
        return len(now) != len(then) and _memory(now) == _memory(then)


@dataclass
class _Move:
    """Rows on their way.

    Args:
        order: which group lies at each place afterwards.
        start: the first place where that is another one than before.
        sources: where the groups from there on lie before, up to the last place that changes.
        taken: the tensor that is written to, and what was taken out of it; those before it are done.
    """

    order: np.ndarray[Any, np.dtype[np.int64]]
    start: int
    sources: Tensor
    taken: tuple[int, Tensor | None] = (-1, None)


class InPlace:
    """Tensors with one order of their groups of rows, which changes without a second copy of more than one of them.

    What moves is taken out of a tensor before anything is written to it, and kept until the next tensor's turn:
    wherever that is interrupted, it is written once more, and the rest follows, the next time an order is asked for.

    Args:
        held: the tensors, each with memory of its own.
        n_groups: of the set.
        layers: of rows: in a tensor of two, those of gate i lie `n_groups` groups below those of value i.

    Attributes:
        modules: those that the tensors belong to.
    """

    def __init__(self, held: Sequence[Held], n_groups: int, layers: int) -> None:
        self._held = held
        self.modules = [each.layer for each in held]
        self._n_groups, self._layers = n_groups, layers
        self._order = np.arange(n_groups * layers)  # which group of which layer lies at each place
        self._move: _Move | None = None

    def dense(self) -> None:
        """Puts all rows back to where they were."""
        self.first(np.arange(self._n_groups))

    def first(self, groups: np.ndarray[Any, Any]) -> list[Tensor]:
        """The rows of some groups, in their order, layer by layer, which then lie first in each tensor."""
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
        """Moves what is on its way, from wherever that was interrupted."""
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
    """What moves the rows of a group set's producers.

    Args:
        held: their tensors.
        others: tensors around the set that are put away while it is thin.
        n_groups: of the set.
        size: rows of a group.
        alone: where memory starts that may be written to (see `unshared`).

    Returns:
        None where a tensor shares its memory, or not all have the same rows in one place: then thin layers are copies.
    """
    n_rows = len(held[0].dense)
    alike = all(len(each.dense) == n_rows and each.device == held[0].device for each in held)
    own = all(_memory(each.dense) in alone for each in (*held, *others))
    if not alike or not own or n_rows not in (n_groups * size, 2 * n_groups * size):
        return None
    return InPlace(held, n_groups, n_rows // (n_groups * size))


def unshared(model: nn.Module) -> frozenset[int]:
    """Where memory starts that one tensor of a model, under one name and in one process, has to itself."""
    modules = [module for _, module in model.named_modules(remove_duplicate=False)]
    found = [each for m in modules for each in (*m._parameters.values(), *m._buffers.values()) if each is not None]
    uses = Counter(map(_memory, found))
    return frozenset(
        _memory(each)
        for each in found
        if uses[_memory(each)] == 1
        and each.is_contiguous()
        and each.untyped_storage().nbytes() == each.nbytes
        and not each.is_inference()  # nothing may be written to it
        and not (each.device.type == "cpu" and each.is_shared())
    )


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def streamed(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of a bank, on a device. To a GPU it goes out of memory that is pinned from then on, and nothing waits
    for it but what the GPU computes next."""
    if device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
        tensor.data = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def copied(module: nn.Module, weights: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """A hook: what a `state_dict` holds of a layer is a copy, which stays as it is when rows move."""
    for name in module._parameters:
        tensor = weights.get(prefix + name)
        if tensor is not None and not isinstance(tensor, nn.Parameter):  # with `keep_vars` it is the parameter
            weights[prefix + name] = tensor.clone()
