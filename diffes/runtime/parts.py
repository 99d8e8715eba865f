"""Parts of a denoiser that a router changes: weights of the layers around a group set, or forwards of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffes.adapters import BlockSet, GroupSet, ModelAdapter
from diffes.adapters.convolutions import as_weight
from diffes.adapters.groups import base_of, is_fused
from diffes.errors import DiffesError
from diffes.pruning.base import GroupWeights
from diffes.runtime.checks import check_attention, replaced, written
from diffes.runtime.in_place import Held, in_place, streamed
from diffes.runtime.resident import Resident


class Part:
    """The layers of one set, either dense or pruned."""

    def load_dense(self) -> None:
        """Restore the dense layers, bit for bit."""
        raise NotImplementedError

    def load_pruned(self, left: GroupWeights) -> None:
        """Keep only these groups."""
        raise NotImplementedError

    def note(self) -> None:
        """Record the present state of the layers as the state that was loaded."""

    def check_dense(self) -> None:
        """Check that no other router has changed the order of the layers' dense tensors.

        Raises:
            DiffesError: their rows lie elsewhere.
        """

    def check_unchanged(self) -> None:
        """Check that the layers are as they were loaded. Otherwise results would be wrong, or changes would be lost.

        Raises:
            DiffesError: they were moved, cast, written to, or given adapters.
        """

    def released(self) -> None:
        """Repair what was derived from pruned layers while they were loaded. Called once routing has ended."""

    def outdated(self) -> bool:
        """Return True where the same weights must be loaded again, because a setting changed since."""
        return False

    @property
    def changed(self) -> bool:
        """True where the layers were written to since they were loaded."""
        return False

    @property
    def spoilt(self) -> bool:
        """True where pruned layers that share the memory of dense ones were written to."""
        return False


class SwappedPart(Part):
    """Layers whose parameters get other tensors, with their dense ones at hand.

    Args:
        name: for messages.
        layers: the layers as they are in the model, maybe with adapters of peft around them.
        held: the parameters that are swapped.

    Attributes:
        modules: those whose parameters are swapped.
    """

    def __init__(self, name: str, layers: Sequence[Any], held: Sequence[Held]) -> None:
        self._name = name
        self._adapters = [(layer, _adapters(layer)) for layer in layers if hasattr(layer, "base_layer")]
        self._held = tuple(held)
        self._parameters = [each.parameter for each in held]
        self._places: list[Any] = [(each.layer._parameters, each.name, each.parameter) for each in held]
        self.modules = [each.layer for each in held]
        self.note()

    def note(self) -> None:
        self._versions, self._pointers = _versions(self._parameters), [p.data_ptr() for p in self._parameters]

    def check_unchanged(self) -> None:
        if self._cast:
            now, then = self._held[0].parameter, self._held[0]
            raise DiffesError(
                f"the model was moved or cast, from {then.dense.dtype} on {then.device} to {now.dtype} on "
                f"{now.device}, while a schedule was routed through it: call diffes.remove(pipe), move it, call "
                "diffes.apply again"
            )
        if any(_adapters(layer) != known for layer, known in self._adapters):
            raise replaced()
        if self.changed:
            raise written(self._name)

    @property
    def _cast(self) -> bool:
        first = self._held[0]
        return first.parameter.dtype != first.dense.dtype or first.parameter.device != first.device

    @property
    def changed(self) -> bool:
        if _versions(self._parameters) != self._versions or any(
            layer[name] is not p for layer, name, p in self._places
        ):
            return True
        if [p.data_ptr() for p in self._parameters] == self._pointers or self._cast:
            return False
        if all(_equal(p, tensor) for p, tensor in zip(self._parameters, self._loaded(), strict=True)):
            self.note()  # they were moved to another device and back
            return False
        return True

    def _loaded(self) -> list[Tensor]:
        """Return what each parameter holds as it was loaded last."""
        raise NotImplementedError


class WidthPart(SwappedPart):
    """The layers around one group set. A consumer that the set shares with others is a `SharedPart`.

    Attention keeps its processor, even one that is set later. Where attention has no heads left, the adapter's
    replacement stands in for its forward, or else one head whose outputs are multiplied by zeros.

    Args:
        adapter: the model.
        groups: the set.
        resident: cache of pruned layers.
        alone: start addresses of the memory in which rows of producers may change places (see
            `diffes.runtime.in_place`), so that pruned layers are no copies.

    Attributes:
        in_place: moves the rows; None where pruned layers are copies.
    """

    def __init__(
        self, adapter: ModelAdapter, groups: GroupSet, resident: Resident, alone: frozenset[int] = frozenset()
    ) -> None:
        self.groups = groups
        self._resident = resident
        self._adapter = adapter
        denoiser = adapter.denoiser
        producers = [denoiser.get_submodule(path) for path in groups.producers]
        consumers = [denoiser.get_submodule(path) for path in (groups.consumers if groups.first is None else ())]
        self.consumers = [Held(base_of(layer), "weight") for layer in consumers]
        by_row = [held for layer in producers for held in (*_own(layer), *_lora(layer, "lora_B"))]
        self._by_row, self._by_column = by_row, [held for layer in consumers for held in _lora(layer, "lora_A")]
        self._away = (*self.consumers, *self._by_column)  # put away while pruned rows are in place
        self.in_place = in_place(by_row, self._away, groups.n_groups, groups.size, alone)
        super().__init__(groups.name, (*producers, *consumers), (*self.consumers, *by_row, *self._by_column))
        self.left: GroupWeights | None = None  # the weights that are loaded
        self.attention: Any = denoiser.get_submodule(groups.attention) if groups.attention is not None else None
        self.norm: Any = denoiser.get_submodule(groups.norm) if groups.norm is not None else None
        self._forward = self.attention.__dict__.get("forward") if self.attention is not None else None
        self._bypassed: Any = None  # the processor at the time when attention lost its last head
        if self.attention is not None:
            check_attention(groups.name, self.attention)

    def check_dense(self) -> None:
        if any(held.is_part() for held in self._by_row):
            raise DiffesError(
                "another schedule is routed through this model, with resident='stream', so that its dense weights are "
                "not in order: remove that one first"
            )

    def check_unchanged(self) -> None:
        if self.attention is not None:
            check_attention(self.groups.name, self.attention)
        super().check_unchanged()

    @property
    def spoilt(self) -> bool:
        rows = [held.parameter for held in self._by_row]
        return self.in_place is not None and _versions(rows) != self._versions[len(self.consumers) :][: len(rows)]

    def outdated(self) -> bool:
        return self._bypassed is not None and self.attention.processor is not self._bypassed

    def load_dense(self) -> None:
        self._load(None)

    def load_pruned(self, left: GroupWeights) -> None:
        self._load(left)

    def released(self) -> None:
        if self.attention is not None and is_fused(self.attention):  # since routing began, maybe from pruned layers
            self.attention.fuse_projections()

    def _loaded(self) -> list[Tensor]:
        return self._tensors(self.left)

    def _load(self, left: GroupWeights | None) -> None:
        if self.attention is not None:
            self._load_attention(left)
        if self.norm is not None:
            self.norm.__dict__["num_groups"] = self.groups.n_groups if left is None else left.kept.numel()
        self.left = left
        try:
            for parameter, tensor in zip(self._parameters, self._tensors(left), strict=True):
                parameter.data = tensor
            if self.in_place is not None and left is not None:
                for held in self._away:
                    held.put_away()
        finally:
            self.note()

    def _load_attention(self, left: GroupWeights | None) -> None:
        attention, self._bypassed = self.attention, None
        heads = self.groups.n_groups if left is None else left.kept.numel()
        attention.__dict__["heads"] = max(heads, 1)  # a module's own `setattr` takes ten times as long
        if "inner_dim" in attention.__dict__:  # some processors divide it by the heads
            attention.__dict__["inner_dim"] = max(heads, 1) * self.groups.size
        put_forward(attention, self._forward)
        if not heads:
            stand_in = self._adapter.without_heads(attention)
            self._bypassed = attention.processor
            if stand_in is not None:
                put_forward(attention, partial(stand_in, attention))

    def _tensors(self, left: GroupWeights | None) -> list[Tensor]:
        """Return what each parameter holds where these groups are left; None stands for all groups."""
        if left is None:  # the dense tensor itself, unless the model was moved since
            if self.in_place is not None:
                self.in_place.dense()
            for held in self._away:
                held.put_back()
            return [held.dense.to(held.parameter.device, held.parameter.dtype) for held in self._held]
        bare = self.attention is not None and not left.kept.numel()  # without heads, the present processor decides
        if self.in_place is not None or bare:
            return self._cut(left)
        return self._resident.get(self.groups.name, [left], lambda: self._cut(left))

    def _cut(self, left: GroupWeights) -> list[Tensor]:
        """Build what each parameter holds where some of the groups are left."""
        device = self._by_row[0].device
        kept, silent = self.routed(left)
        features = self.groups.features(kept.to(device, torch.long))
        if self.in_place is not None:
            rows = self.in_place.first(kept.cpu().numpy())
        else:
            lengths, width = {len(held.dense) for held in self._by_row}, self.groups.width
            # of a gated FFN, value rows lie above gate rows
            stacked = {n: torch.cat([features + start for start in range(0, n, width)]) for n in lengths}
            rows = [held.dense.index_select(0, stacked[len(held.dense)]) for held in self._by_row]
        columns = [held.dense.to(device).index_select(1, features) for held in self._by_column]
        if silent:
            columns = [torch.zeros_like(tensor) for tensor in columns]
        consumers = [
            cut_columns(held.dense, each, features, silent, self.in_place is not None, device)
            for held, each in zip(self.consumers, left.consumers or [None] * len(self.consumers), strict=False)
        ]
        return [*consumers, *rows, *columns]

    def routed(self, left: GroupWeights) -> tuple[Tensor, bool]:
        """Return the groups that layers keep, and whether they are to count nothing: where no head is left and the
        processor needs one, one is kept and multiplied by zero."""
        silent = not left.kept.numel() and self._bypassed is not None and "forward" not in self.attention.__dict__
        return left.kept.new_zeros(1) if silent else left.kept, silent


def cut_columns(
    dense: Tensor, compensated: Tensor | None, features: Tensor, silent: bool, streams: bool, device: torch.device
) -> Tensor:
    """Return the weight of a consumer with some of its inputs.

    Args:
        dense: its weight with all of a set's inputs.
        compensated: those columns of a method that compensates, as a matrix; None where they stay as they are.
        features: indices of the inputs.
        silent: whether they are to count nothing.
        streams: whether a tensor of the bank is copied without waiting.
        device: where the layer computes.
    """
    if silent or compensated is None:
        found = dense.to(device).index_select(1, features)
        return found.zero_() if silent else found
    return as_weight(streamed(compensated, device) if streams else compensated.to(device), dense)


class SharedPart(SwappedPart):
    """A consumer whose inputs are those of several group sets, one after the other.

    Args:
        layer: the consumer.
        path: its module path.
        parts: the sets' other layers, in the order of their inputs; they are loaded before it.
        resident: cache of pruned layers.
    """

    def __init__(self, layer: Any, path: str, parts: Sequence[WidthPart], resident: Resident) -> None:
        self._parts, self._resident, self._path = parts, resident, path
        super().__init__(path, [layer], [Held(base_of(layer), "weight"), *_lora(layer, "lora_A")])

    def load_dense(self) -> None:
        """Take the columns of the groups that the sets' other layers were loaded with: all, if these are dense."""
        try:
            for parameter, tensor in zip(self._parameters, self._loaded(), strict=True):
                parameter.data = tensor
            if self._streams and any(part.left is not None for part in self._parts):
                for held in self._held:
                    held.put_away()
        finally:
            self.note()

    @property
    def _streams(self) -> bool:
        return any(part.in_place is not None for part in self._parts)

    def _loaded(self) -> list[Tensor]:
        left = [part.left for part in self._parts]
        if all(each is None for each in left):
            for held in self._held:
                held.put_back()
            return [held.dense.to(held.parameter.device, held.parameter.dtype) for held in self._held]
        bare = any(part.attention is not None and part.left and not part.left.kept.numel() for part in self._parts)
        return self._cut() if self._streams or bare else self._resident.get(self._path, left, self._cut)

    def _cut(self) -> list[Tensor]:
        return [
            torch.cat([self._piece(held.dense, part, adapts=i > 0) for part in self._parts], 1)
            for i, held in enumerate(self._held)
        ]

    def _piece(self, dense: Tensor, part: WidthPart, adapts: bool) -> Tensor:
        """Return the columns that a set has in a tensor: the weight, or a matrix of an adapter."""
        left, groups, device = part.left, part.groups, self._held[0].device
        own = groups.own(dense, 1)
        if left is None:
            return own.to(device)
        kept, silent = part.routed(left)
        compensated = left.consumers[0] if left.consumers and not adapts else None
        return cut_columns(
            own, compensated, groups.features(kept.to(device, torch.long)), silent, self._streams, device
        )


class DepthPart(Part):
    """All blocks. A skipped block stays in the model, because other layers may read parts of it, and returns its input.

    Args:
        adapter: the model.
        blocks: the set.
    """

    def __init__(self, adapter: ModelAdapter, blocks: BlockSet) -> None:
        self._adapter = adapter
        self.blocks = [adapter.denoiser.get_submodule(path) for path in blocks.blocks]
        self._forwards = [
            block.__dict__.get("forward") for block in self.blocks
        ]  # a forward of the instance, where hooks set one

    def load_dense(self) -> None:
        for block, forward in zip(self.blocks, self._forwards, strict=True):
            put_forward(block, forward)

    def load_pruned(self, left: GroupWeights) -> None:
        kept = set(left.kept.tolist())
        for i, (block, forward) in enumerate(zip(self.blocks, self._forwards, strict=True)):
            put_forward(block, forward if i in kept else self._adapter.skipped(block))


def put_forward(module: nn.Module, forward: Any) -> None:
    """Set the forward of a module instance, or, where it is None, restore that of its class."""
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


def _versions(parameters: Sequence[Tensor]) -> list[int]:
    """Return how often each parameter was written to; an empty list in inference mode, which does not count."""
    try:
        return [parameter._version for parameter in parameters]
    except RuntimeError:
        return []


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _own(layer: Any) -> list[Held]:
    """Return weight and bias of a layer, without those of its adapters."""
    base = base_of(layer)
    return [Held(base, name) for name in ("weight", "bias") if getattr(base, name, None) is not None]


def _lora(layer: Any, part: str) -> list[Held]:
    """Return the LoRA matrices that peft put beside a layer.

    Raises:
        DiffesError: the layer carries an adapter of another kind.
    """
    if not hasattr(layer, "base_layer"):
        return []
    plain = hasattr(layer, part) and not len(getattr(layer, "lora_magnitude_vector", ()))
    matrices = list(getattr(layer, part).values()) if plain else []
    if not plain or layer.merged or any(getattr(matrix, "bias", None) is not None for matrix in matrices):
        raise DiffesError(
            f"{type(layer).__name__} carries an adapter that is no plain LoRA, or one that is fused, which cannot be "
            "cut to pruned layers; unfuse or unload it, or save the fused model and search on that"
        )
    return [Held(matrix, "weight") for matrix in matrices]


def _adapters(layer: Any) -> tuple[bool, tuple[str, ...]]:
    """Return whether a layer's adapters are fused into it, and their names."""
    return getattr(layer, "merged", False), tuple(getattr(layer, "lora_A", ()))
