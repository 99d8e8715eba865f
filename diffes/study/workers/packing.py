"""Things with tensors as Ray's object store takes them: mapped, not copied."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import torch
from torch import Tensor


class _Packer(pickle.Pickler):
    """Puts the bytes of tensors beside the pickle."""

    def reducer_override(self, thing: Any) -> Any:
        if type(thing) is not Tensor:
            return NotImplemented
        whole = thing.detach().cpu().contiguous()
        flat: Any = whole.reshape(-1).view(torch.uint8).numpy()
        return _tensor, (pickle.PickleBuffer(flat), whole.dtype, whole.shape)


def packed(thing: object) -> tuple[bytes, list[Any]]:
    """A thing as a pickle, and the bytes of its tensors as arrays, which Ray's object store maps."""
    file, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Packer(file, protocol=5, buffer_callback=buffers.append).dump(thing)
    return file.getvalue(), [np.asarray(memoryview(buffer)) for buffer in buffers]


def unpacked(packed: tuple[bytes, list[Any]]) -> Any:
    """The thing; its tensors are those of the arrays."""
    return pickle.loads(packed[0], buffers=packed[1])


def _tensor(data: Any, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.from_numpy(np.asarray(memoryview(data))).view(dtype).reshape(shape)
