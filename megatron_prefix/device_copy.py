"""Many small arrays to a device in one copy that the host does not wait for.

Copies from pageable memory wait for the device, and each has its own launch. Here arrays lie one
behind the other in one pinned buffer, and the tensors are views of its copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64
"""Bytes: of every array's start, more than any dtype or kernel asks for."""


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
