"""Cache of pruned layers on the device, so that a change of stage or level only changes pointers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from diffes.errors import DiffesError
from diffes.pruning.base import GroupWeights

MODES = ("auto", "all", "stream")
Key = tuple[str, tuple[int, ...]]
CGROUP = Path("/sys/fs/cgroup")  # memory limits of a container, where it has some


class Resident:
    """Cache of the tensors of pruned group sets, within a limit of bytes. The least recently used are dropped.

    Args:
        limit: bytes; 0 keeps nothing, None keeps everything.

    Attributes:
        nbytes: of the tensors held. On the CPU the bank's own weights are among them.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.nbytes = 0
        self._held: OrderedDict[Key, tuple[Sequence[GroupWeights | None], list[Tensor]]] = OrderedDict()

    def get(self, name: str, left: Sequence[GroupWeights | None], make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return the tensors of a layer for these weights of a bank, of each set, from the cache or made now."""
        key: Key = (name, tuple(map(id, left)))  # they are held too, so that no other object gets such an id
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key][1]
        made = make()
        if self.limit != 0:
            self._held[key] = (left, made)
            self.nbytes += _bytes(made)
            while self.limit is not None and self.nbytes > self.limit:
                self.nbytes -= _bytes(self._held.popitem(last=False)[1][1])
        return made

    def clear(self) -> None:
        """Drop everything."""
        self._held.clear()
        self.nbytes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Resident:
        return Resident(self.limit)


def limit_of(mode: str, device: torch.device) -> int | None:
    """Return how many bytes of pruned layers may stay on a device.

    Args:
        mode: "all" keeps every layer that was used, "stream" none (layers in use then lie in the memory of the dense
            ones), "auto" as many as fit into half of the memory that is free now.
        device: where the model is.

    Raises:
        DiffesError: there is no such mode.
    """
    if mode not in MODES:
        raise DiffesError(f"resident must be one of {', '.join(MODES)}, got {mode!r}")
    return {"all": None, "stream": 0}.get(mode, _free(device) // 2)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:  # a container's own limit
        most, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        return max(0, min(free, most - used))
    except (OSError, ValueError):  # no limit, or "max"
        return free


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
