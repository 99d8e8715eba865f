"""Pickling of objects with tensors, so that Ray's object store maps the tensors and does not copy them."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import torch
from torch import Tensor


class _Packer(pickle.Pickler):
    """Pickler that puts the bytes of tensors beside the pickle."""

    def reducer_override(self, thing: Any) -> Any:
        if type(thing) is not Tensor:
            return NotImplemented
        whole = thing.detach().cpu().contiguous()
        flat: Any = whole.reshape(-1).view(torch.uint8).numpy()
        return _tensor, (pickle.PickleBuffer(flat), whole.dtype, whole.shape)


def packed(thing: object) -> tuple[bytes, list[Any]]:
    """Pickle an object. Return the pickle, and the bytes of its tensors as arrays, which Ray's object store maps."""
    file, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Packer(file, protocol=5, buffer_callback=buffers.append).dump(thing)
    return file.getvalue(), [np.asarray(memoryview(buffer)) for buffer in buffers]


def unpacked(packed: tuple[bytes, list[Any]]) -> Any:
    """Restore an object. Its tensors share the memory of the arrays."""
    return pickle.loads(packed[0], buffers=packed[1])


def _tensor(data: Any, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.from_numpy(np.asarray(memoryview(data))).view(dtype).reshape(shape)
