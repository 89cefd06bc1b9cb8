"""Many small arrays to a device in one copy that the host does not wait for.

Copies from pageable memory wait for the device, and each has its own launch. Here arrays lie one
behind the other in one pinned buffer, and the tensors are views of its copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64
"""Bytes: of every array's start, more than any dtype or kernel asks for."""


def record_to_device(record: Any, device: torch.device | str) -> Any:
    """The same record with a tensor on `device` in the place of each NumPy array, in one copy.

    Args:
        record: dataclasses and tuples, nested, whose leaves are arrays or anything else, which
            stays. An array that occurs several times is copied once.
    """
    arrays: dict[int, np.ndarray] = {}

    def collect(array: np.ndarray) -> np.ndarray:
        arrays[id(array)] = array
        return array

    _with_arrays(record, collect)
    tensors = dict(zip(arrays, copy_to_device(list(arrays.values()), device), strict=True))
    return _with_arrays(record, lambda array: tensors[id(array)])


def _with_arrays(value: Any, change: Callable[[np.ndarray], Any]) -> Any:
    """A copy of nested records in which each array has been changed."""
    if isinstance(value, np.ndarray):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_with_arrays(item, change) for item in value)
    if dataclasses.is_dataclass(value):
        fields = (field.name for field in dataclasses.fields(value))
        changed = {name: _with_arrays(getattr(value, name), change) for name in fields}
        return dataclasses.replace(value, **changed)
    return value


def copy_to_device(arrays: Sequence[np.ndarray], device: torch.device | str) -> list[Tensor]:
    """The arrays as tensors of the same dtypes and shapes on `device`, of memory of their own.

    The copy is in the current stream. Its source is kept until it is done: torch's allocator of
    pinned memory waits for the stream before it gives the memory away again.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return [torch.from_numpy(np.array(array, order="C")) for array in arrays]
    offsets, end = [], 0
    for array in arrays:
        offsets.append(end)
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    host = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for offset, array in zip(offsets, arrays, strict=True):
        _view(host, offset, array).copy_(torch.from_numpy(np.array(array, order="C")))
    copied = host.to(device, non_blocking=True)
    return [_view(copied, offset, array) for offset, array in zip(offsets, arrays, strict=True)]


def _view(buffer: Tensor, offset: int, array: np.ndarray) -> Tensor:
    dtype = torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype
    return buffer[offset : offset + array.nbytes].view(dtype).view(array.shape)
