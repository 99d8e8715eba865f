"""One triangle for all levels of a consumer in one stage; levels are made on request, within a limit of memory."""

from __future__ import annotations

import abc
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffes.adapters import GroupSet
from diffes.errors import DiffesError
from diffes.pruning.base import GroupWeights, LayerWeights, WidthMethod

ROWS = 128  # rows of a triangle that are stored, and applied, together
MEMORY = 4_000_000_000  # bytes, the default limit


@dataclass(frozen=True, eq=False)
class Factor:
    """Order in which the groups of a set are dropped in one stage, and how the rest compensates for each.

    Dropping input g subtracts `y_g r_g` from a consumer's weight `W`, with `y_g` the column of g and
    `r_g = H^-1_g / H^-1_gg` at that time. In the order of dropping, the rows `r` are a unit upper triangle `R`, and
    `Y R = W`. So with any prefix D dropped and the rest K kept, the weights left are `W_K - Y_D R_DK` with
    `Y_D = W_D R_DD^-1`: the least-squares optimum `W H[:,K] H[K,K]^-1`.

    Args:
        groups: the group set.
        order: (n_groups,) int32 indices of the groups, in the order of dropping.
        triangles: R of each consumer, in the layout of `pack`, in memory or in a file.
    """

    groups: GroupSet
    order: Tensor
    triangles: tuple[Tensor | Stored, ...]

    def kept(self, n_kept: int) -> Tensor:
        """Return the indices (n_kept,) of the groups that stay, rising, int32."""
        return self.order[self.groups.n_groups - n_kept :].sort().values

    @torch.no_grad()
    def consumers(self, dense: Sequence[Tensor], n_kept: int) -> tuple[Tensor, ...]:
        """Return the weight (d_out, n_kept * size) of each consumer where `n_kept` groups stay, on the device and in
        the dtype of the dense one (d_out, d)."""
        n_dropped = self.groups.n_groups - n_kept
        made = []
        for weight, triangle in zip(dense, self.triangles, strict=True):
            left = self._in_order(weight)
            for start, stop, block in self._blocks(triangle, n_dropped * self.groups.size, weight):
                left[:, stop:].addmm_(_columns(left, block, start, stop), block[:, stop - start :], alpha=-1)
            places = self.order[n_dropped:].argsort().to(weight.device)
            made.append(left[:, self.groups.features(places + n_dropped)].to(weight.dtype))
        return tuple(made)

    @torch.no_grad()
    def effects(self, i: int, dense: Tensor, inputs: Tensor, backward: Tensor) -> Tensor:
        """Return the change of directional derivatives by dropping groups from one consumer, for every number of
        dropped groups at once.

        Args:
            i: number of the consumer.
            dense: (d_out, d) its weight.
            inputs: (n, tokens, d) of it.
            backward: (directions, n, tokens, d_out) gradients with respect to its outputs.

        Returns:
            (directions, n, n_groups + 1) fp64 sums over the tokens of the gradient times the change of the output, by
            the number of groups dropped.
        """
        left, x = self._in_order(dense), inputs.to(_compute(dense))[..., self._inputs().to(dense.device)]
        parts = []
        for start, stop, block in self._blocks(self.triangles[i], left.shape[1], dense):
            columns = _columns(left, block, start, stop)
            parts.append(-((backward.to(x) @ columns) * (x[..., start:] @ block.T)).sum(2).double())
            left[:, stop:].addmm_(columns, block[:, stop - start :], alpha=-1)
        by_group = torch.cat(parts, -1).unflatten(-1, (-1, self.groups.size)).sum(-1)
        return torch.nn.functional.pad(by_group.cumsum(-1), (1, 0))

    def _inputs(self) -> Tensor:
        return self.groups.features(self.order.long())

    def _in_order(self, dense: Tensor) -> Tensor:
        return dense[:, self._inputs().to(dense.device)].to(_compute(dense))

    def _blocks(self, triangle: Tensor | Stored, n_rows: int, like: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the first rows of R, block by block: rows [start, stop) from column `start` on."""
        d = self.groups.width
        sizes = [min(ROWS, d - start) * (d - start) for start in range(0, n_rows, ROWS)]
        flat = triangle[: sum(sizes)]
        for i, block in enumerate(flat.split(sizes)):
            start = i * ROWS
            stop = min(start + ROWS, n_rows)
            rows = block.view(-1, d - start)[: stop - start]
            yield start, stop, rows.to(like.device, _compute(like))


def _columns(left: Tensor, block: Tensor, start: int, stop: int) -> Tensor:
    """Return the columns Y (d_out, stop - start) of a block of rows, from the weights that are left before it."""
    corner = block[:, : stop - start]
    return torch.linalg.solve_triangular(corner, left[:, start:stop], upper=True, left=False, unitriangular=True)


def _compute(dense: Tensor) -> torch.dtype:
    return torch.promote_types(dense.dtype, torch.float32)


def pack(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a unit upper triangle as one vector: blocks of `ROWS` rows, each from its first column on.

    Args:
        rows: (d, d); only the entries above the diagonal are read.
        dtype: of the model. Triangles of half-precision models are kept in fp16, which has 11 significant bits where
            bf16 has 8.
    """
    stored = dtype if dtype in (torch.float32, torch.float64) else torch.float16
    blocks = []
    for start in range(0, len(rows), ROWS):
        block = rows[start : start + ROWS, start:].triu(1)
        block.diagonal().fill_(1)
        blocks.append(block.to("cpu", stored).flatten())
    return torch.cat(blocks)


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Input for a factor of one set in one stage.

    Args:
        groups: the set.
        weights: of the layers around it.
        inputs: statistics of each consumer's inputs, as the method `needs` them.
    """

    groups: GroupSet
    weights: LayerWeights
    inputs: Sequence[Tensor]


def packed_size(d: int) -> int:
    """Return the number of elements of a triangle (d, d) in the layout of `pack`."""
    return sum(min(ROWS, d - start) * (d - start) for start in range(0, d, ROWS))


class FactoredMethod(WidthMethod):
    """Base class of methods where the rest compensates for what is dropped. A bank keeps one triangle of each consumer
    for all levels in a stage."""

    @abc.abstractmethod
    def factors(self, layers: Iterable[LayerStatistics]) -> Iterator[Factor]:
        """Yield order and triangles of each of several sets of one shape, in one stage. Sets are taken from the
        iterable one after another."""

    def factor(self, groups: GroupSet, weights: LayerWeights, inputs: Sequence[Tensor]) -> Factor:
        """Return order and triangles of one set; arguments as those of `prune`."""
        return next(iter(self.factors([LayerStatistics(groups, weights, inputs)])))

    def prune(
        self, groups: GroupSet, weights: LayerWeights, inputs: Sequence[Tensor], n_kept: Sequence[int]
    ) -> list[GroupWeights]:
        factor = self.factor(groups, weights, inputs)
        return [GroupWeights(factor.kept(n), factor.consumers(weights.consumers, n)) for n in n_kept]


class FactoredWeights(GroupWeights):
    """One group set at one level of one stage, whose consumers are made on request.

    Args:
        factor: order and triangles.
        dense: (d_out, d) the dense weight of each consumer.
        n_kept: number of groups that stay.
        workshop: makes the consumers and caches them.
    """

    factor: Factor

    def __init__(self, factor: Factor, dense: tuple[Tensor, ...], n_kept: int, workshop: Workshop) -> None:
        for name, value in {"kept": factor.kept(n_kept), "factor": factor, "_dense": dense, "_shop": workshop}.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without model and workshop; another process adds its own (see `diffes.pruning.build.gathered`)."""
        return {"kept": self.kept, "factor": self.factor}

    def __deepcopy__(self, memo: dict[int, Any]) -> FactoredWeights:
        return self  # immutable

    @property
    def consumers(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        """The consumers (d_out, n_kept * size) in host memory, the same whenever they are made."""
        shop: Workshop = self.__dict__["_shop"]
        return shop.make(self.factor, self.__dict__["_dense"], len(self.kept))

    @property
    def nbytes(self) -> int:
        """Bytes of the indices; cached consumers count for the workshop."""
        return self.kept.nbytes


class Workshop:
    """Store of triangles, and cache of the levels made from them, within a limit of host memory.

    Half of the limit is for triangles; further ones lie in a temporary file, which is deleted when the process ends.
    The rest is for levels that are ready; the least recently used one is dropped first.

    Args:
        limit: bytes of host memory.

    Attributes:
        seconds: time that making levels took.
        made: number of levels of a set made.
        filed: bytes of the triangles in the file.
    """

    def __init__(self, limit: int = MEMORY) -> None:
        self.limit = limit
        self.seconds, self.made, self.filed = 0.0, 0, 0
        self._held = self._ready_bytes = 0
        self._ready: OrderedDict[tuple[Factor, int], tuple[Tensor, ...]] = OrderedDict()
        self._file: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes in host memory."""
        return self._held + self._ready_bytes

    def __reduce__(self) -> Any:
        """Pickle as an empty workshop with the same limit."""
        return Workshop, (self.limit,)

    def keep(self, factor: Factor) -> Factor:
        """Return the same factor with its triangles in memory, or in the temporary file where memory has no room.

        Raises:
            DiffesError: the temporary file has no room either.
        """
        kept = tuple(self._kept(triangle) for triangle in factor.triangles)
        moved = any(isinstance(triangle, Stored) for triangle in kept)
        return Factor(factor.groups, factor.order, kept) if moved else factor

    def _kept(self, triangle: Tensor | Stored) -> Tensor | Stored:
        assert isinstance(triangle, Tensor)
        if self._held + triangle.nbytes <= self.limit // 2:
            self._held += triangle.nbytes
            return triangle
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="diffes-bank-")  # noqa: SIM115 (as long as the process)
            self._file.seek(self.filed)
            self._file.write(triangle.view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as error:
            raise DiffesError(
                f"the bank's triangles, {(self.filed + triangle.nbytes) / 1e9:.1f} GB so far, have no room in "
                f"{tempfile.gettempdir()} ({error}): set TMPDIR to a folder with more room, or raise --bank-memory"
            ) from error
        stored = Stored(self._file, self.filed, triangle.dtype, len(triangle))
        self.filed += triangle.nbytes
        return stored

    def make(self, factor: Factor, dense: Sequence[Tensor], n_kept: int) -> tuple[Tensor, ...]:
        """Return the consumers (d_out, n_kept * size) of a set in host memory, from the cache or made now."""
        key = (factor, n_kept)
        if key in self._ready:
            self._ready.move_to_end(key)
            return self._ready[key]
        start = time.perf_counter()
        consumers = tuple(consumer.cpu() for consumer in factor.consumers(dense, n_kept))
        self.seconds += time.perf_counter() - start
        self.made += 1
        self._ready[key] = consumers
        self._ready_bytes += _bytes(consumers)
        while self._ready_bytes > self.limit - self._held and len(self._ready) > 1:
            self._ready_bytes -= _bytes(self._ready.popitem(last=False)[1])
        return consumers


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True, eq=False)
class Stored:
    """Vector in an open file, of which a prefix is read at a time.

    Args:
        file: open for reading.
        offset: bytes before it.
        dtype: of its elements.
        size: number of elements.
    """

    file: Any
    offset: int
    dtype: torch.dtype
    size: int

    def __reduce__(self) -> Any:
        """Pickle as a vector in memory, because the file belongs to this process."""
        return Tensor.detach, (self[: self.size],)

    def __getitem__(self, part: slice) -> Tensor:
        read = torch.empty(part.stop, dtype=self.dtype)
        self.file.seek(self.offset)
        if self.file.readinto(read.view(torch.uint8).numpy().data) != read.nbytes:
            raise DiffesError("the temporary file of the bank's triangles was cut short: run the same command again")
        return read
