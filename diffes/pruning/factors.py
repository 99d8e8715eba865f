"""All levels of a layer in one stage from one triangle, made when they are asked for, within a limit of memory."""

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

ROWS = 128  # of a triangle that are stored, and applied, together
MEMORY = 4_000_000_000  # bytes, where no limit is named


@dataclass(frozen=True, eq=False)
class Factor:
    """In which order the groups of a layer go in one stage, and what the rest makes up for each.

    Dropping input g takes `y_g r_g` from the consumer's weight `W`, with `y_g` the column of g and
    `r_g = H^-1_g / H^-1_gg` at that time. In the order of dropping, the rows `r` are a unit upper triangle `R`, and
    `Y R = W`. So with any prefix D dropped and the rest K kept, the weights left are `W_K - Y_D R_DK` with
    `Y_D = W_D R_DD^-1`: the least-squares optimum `W H[:,K] H[K,K]^-1`.

    Args:
        groups: the group set.
        order: (n_groups,) indices of the groups, int32, the one that goes first first.
        triangle: R, as `pack` lays it out, in memory or in a file.
    """

    groups: GroupSet
    order: Tensor
    triangle: Tensor | Stored

    def kept(self, n_kept: int) -> Tensor:
        """(n_kept,) indices of the groups that stay, rising, int32."""
        return self.order[self.groups.n_groups - n_kept :].sort().values

    @torch.no_grad()
    def consumer(self, dense: Tensor, n_kept: int) -> Tensor:
        """(d_out, n_kept * size) the consumer's weight when so many groups stay, on the device and in the dtype of the
        dense one (d_out, d)."""
        n_dropped = self.groups.n_groups - n_kept
        left = self._in_order(dense)
        for start, stop, block in self._blocks(n_dropped * self.groups.size, dense):
            left[:, stop:].addmm_(_columns(left, block, start, stop), block[:, stop - start :], alpha=-1)
        places = self.order[n_dropped:].argsort().to(dense.device)
        return left[:, self.groups.features(places + n_dropped)].to(dense.dtype)

    @torch.no_grad()
    def effects(self, dense: Tensor, inputs: Tensor, backward: Tensor) -> Tensor:
        """What dropping groups adds to directional derivatives, for every number of groups at once.

        Args:
            dense: (d_out, d) the consumer's weight.
            inputs: (n, tokens, d) of the consumer.
            backward: (directions, n, tokens, d_out) gradients by the consumer's outputs.

        Returns:
            (directions, n, n_groups + 1) fp64 sums over the tokens of the gradient times the change of the output, by
            the number of groups dropped.
        """
        left, x = self._in_order(dense), inputs.to(_compute(dense))[..., self._inputs().to(dense.device)]
        parts = []
        for start, stop, block in self._blocks(left.shape[1], dense):
            columns = _columns(left, block, start, stop)
            parts.append(-((backward.to(x) @ columns) * (x[..., start:] @ block.T)).sum(2).double())
            left[:, stop:].addmm_(columns, block[:, stop - start :], alpha=-1)
        by_group = torch.cat(parts, -1).unflatten(-1, (-1, self.groups.size)).sum(-1)
        return torch.nn.functional.pad(by_group.cumsum(-1), (1, 0))

    def _inputs(self) -> Tensor:
        return self.groups.features(self.order.long())

    def _in_order(self, dense: Tensor) -> Tensor:
        return dense[:, self._inputs().to(dense.device)].to(_compute(dense))

    def _blocks(self, n_rows: int, like: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """The first rows of R, block by block: rows [start, stop) from column `start` on."""
        d = self.groups.n_groups * self.groups.size
        sizes = [min(ROWS, d - start) * (d - start) for start in range(0, n_rows, ROWS)]
        flat = self.triangle[: sum(sizes)]
        for i, block in enumerate(flat.split(sizes)):
            start = i * ROWS
            stop = min(start + ROWS, n_rows)
            rows = block.view(-1, d - start)[: stop - start]
            yield start, stop, rows.to(like.device, _compute(like))


def _columns(left: Tensor, block: Tensor, start: int, stop: int) -> Tensor:
    """(d_out, stop - start) the columns Y of a block of rows, from the weights that are left before it."""
    corner = block[:, : stop - start]
    return torch.linalg.solve_triangular(corner, left[:, start:stop], upper=True, left=False, unitriangular=True)


def _compute(dense: Tensor) -> torch.dtype:
    return torch.promote_types(dense.dtype, torch.float32)


def pack(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A unit upper triangle as one vector: blocks of `ROWS` rows, each from its first column on.

    Args:
        rows: (d, d); what is not above the diagonal is not looked at.
        dtype: of the model. Triangles of half-precision ones are kept in fp16, which has 11 digits where bf16 has 8.
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
    """What a factor is made of, in one stage.

    Args:
        groups: the set.
        weights: of the layers around it.
        inputs: statistics of the consumer's inputs, as the method `needs` them.
    """

    groups: GroupSet
    weights: LayerWeights
    inputs: Tensor | None


def packed_size(d: int) -> int:
    """Elements of a triangle (d, d) as `pack` lays it out."""
    return sum(min(ROWS, d - start) * (d - start) for start in range(0, d, ROWS))


class FactoredMethod(WidthMethod):
    """A method whose rest makes up for what goes: a bank keeps one triangle for all its levels in a stage."""

    @abc.abstractmethod
    def factors(self, layers: Iterable[LayerStatistics]) -> Iterator[Factor]:
        """Order and triangle of each of some layers of one shape, in one stage; takes the layers as it goes."""

    def factor(self, groups: GroupSet, weights: LayerWeights, inputs: Tensor | None) -> Factor:
        """Order and triangle of one layer; arguments as those of `prune`."""
        return next(iter(self.factors([LayerStatistics(groups, weights, inputs)])))

    def prune(
        self, groups: GroupSet, weights: LayerWeights, inputs: Tensor | None, n_kept: Sequence[int]
    ) -> list[GroupWeights]:
        factor = self.factor(groups, weights, inputs)
        return [GroupWeights(factor.kept(n), factor.consumer(weights.consumer, n)) for n in n_kept]


class FactoredWeights(GroupWeights):
    """One group set at one level of one stage, whose consumer is made when it is asked for.

    Args:
        factor: order and triangle.
        dense: (d_out, d) the consumer's dense weight.
        n_kept: how many groups stay.
        workshop: makes it, and keeps it ready for a while.
    """

    factor: Factor

    def __init__(self, factor: Factor, dense: Tensor, n_kept: int, workshop: Workshop) -> None:
        for name, value in {"kept": factor.kept(n_kept), "factor": factor, "_dense": dense, "_shop": workshop}.items():
            object.__setattr__(self, name, value)  # frozen, as all of its kind

    def __getstate__(self) -> dict[str, Any]:
        """In another process they are of the model and the workshop there (see `diffes.pruning.build.gathered`)."""
        return {"kept": self.kept, "factor": self.factor}

    def __deepcopy__(self, memo: dict[int, Any]) -> FactoredWeights:
        return self  # nothing of it changes

    @property
    def consumer(self) -> Tensor:  # type: ignore[override]
        """(d_out, n_kept * size) in host memory, the same whenever it is made."""
        shop: Workshop = self.__dict__["_shop"]
        return shop.make(self.factor, self.__dict__["_dense"], len(self.kept))

    @property
    def nbytes(self) -> int:
        """Bytes of the indices; what is ready is the workshop's."""
        return self.kept.nbytes


class Workshop:
    """Triangles, and the levels made from them, within a limit of host memory.

    Half of it is for triangles; those beyond lie in a temporary file, which goes when the process does. The rest is for
    levels that are ready: the one that was not asked for longest makes room.

    Args:
        limit: bytes of host memory.

    Attributes:
        seconds: that making levels took.
        made: how many consumers were made.
        filed: bytes of the triangles in the file.
    """

    def __init__(self, limit: int = MEMORY) -> None:
        self.limit = limit
        self.seconds, self.made, self.filed = 0.0, 0, 0
        self._held = self._ready_bytes = 0
        self._ready: OrderedDict[tuple[Factor, int], Tensor] = OrderedDict()
        self._file: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes in host memory."""
        return self._held + self._ready_bytes

    def __reduce__(self) -> Any:
        """In another process there is another workshop of as much memory."""
        return Workshop, (self.limit,)

    def keep(self, factor: Factor) -> Factor:
        """The same factor with its triangle where there is room for it.

        Raises:
            DiffesError: the temporary file has no room either.
        """
        triangle = factor.triangle
        assert isinstance(triangle, Tensor)
        if self._held + triangle.nbytes <= self.limit // 2:
            self._held += triangle.nbytes
            return factor
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="diffes-bank-")  # noqa: SIM115 (as long as the process)
            self._file.seek(self.filed)
            self._file.write(triangle.view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as error:
            raise DiffesError(
                f"the bank's triangles, {(self.filed + triangle.nbytes) / 1e9:.1f} GB so far, have no room in "
                f"{tempfile.gettempdir()} ({error}): name a folder with more in TMPDIR, or raise --bank-memory"
            ) from error
        stored = Stored(self._file, self.filed, triangle.dtype, len(triangle))
        self.filed += triangle.nbytes
        return Factor(factor.groups, factor.order, stored)

    def make(self, factor: Factor, dense: Tensor, n_kept: int) -> Tensor:
        """A consumer (d_out, n_kept * size) in host memory, ready or made."""
        key = (factor, n_kept)
        if key in self._ready:
            self._ready.move_to_end(key)
            return self._ready[key]
        start = time.perf_counter()
        consumer = factor.consumer(dense, n_kept).cpu()
        self.seconds += time.perf_counter() - start
        self.made += 1
        self._ready[key] = consumer
        self._ready_bytes += consumer.nbytes
        while self._ready_bytes > self.limit - self._held and len(self._ready) > 1:
            self._ready_bytes -= self._ready.popitem(last=False)[1].nbytes
        return consumer


@dataclass(frozen=True, eq=False)
class Stored:
    """A vector in an open file, of which the first so many elements are read at a time.

    Args:
        file: open for reading.
        offset: bytes before it.
        dtype: of its elements.
        size: how many.
    """

    file: Any
    offset: int
    dtype: torch.dtype
    size: int

    def __reduce__(self) -> Any:
        """In another process it is a vector in memory: the file is this one's."""
        return Tensor.detach, (self[: self.size],)

    def __getitem__(self, part: slice) -> Tensor:
        read = torch.empty(part.stop, dtype=self.dtype)
        self.file.seek(self.offset)
        if self.file.readinto(read.view(torch.uint8).numpy().data) != read.nbytes:
            raise DiffesError("the temporary file of the bank's triangles was cut short: run the same command again")
        return read
