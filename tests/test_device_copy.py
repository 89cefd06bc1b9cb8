"""Arrays that go to a device in one copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_prefix import device_copy
from megatron_prefix.device_copy import copy_to_device, record_to_device
from megatron_prefix.layout import AttentionStage, Rectangles

ARRAYS = [
    np.arange(7, dtype=np.int32),
    np.empty(0, dtype=np.int64),
    np.arange(6.0).reshape(2, 3).T,
    np.array(3, dtype=np.int64),
    np.arange(40, dtype=np.int64)[::3],
    np.array([True, False]),
]


def check(tensors: list[torch.Tensor]) -> None:
    for tensor, array in zip(tensors, ARRAYS, strict=True):
        assert tensor.shape == array.shape
        assert np.array_equal(tensor.cpu().numpy(), array)
        assert tensor.numpy(force=True).dtype == array.dtype


def test_on_the_cpu_they_are_copies():
    tensors = copy_to_device(ARRAYS, "cpu")
    check(tensors)
    tensors[0].zero_()
    assert ARRAYS[0].any()


def test_elsewhere_they_are_parts_of_one_aligned_buffer(monkeypatch):
    """With the CPU in the part of a device, by its other name."""

    class NotQuiteCpu:
        type = "other"

        def __new__(cls, _):
            return object.__new__(cls)

    real_to = torch.Tensor.to
    monkeypatch.setattr(device_copy.torch, "device", NotQuiteCpu)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, _, **options: real_to(self, "cpu"))
    tensors = copy_to_device(ARRAYS, "other")
    check(tensors)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert all(t.storage_offset() * t.element_size() % 64 == 0 for t in tensors)


def test_a_record_goes_in_one_copy_and_an_array_that_it_holds_twice_goes_once(monkeypatch):
    copies = []

    def copy(arrays, device):
        copies.append(len(arrays))
        return copy_to_device(arrays, device)

    monkeypatch.setattr(device_copy, "copy_to_device", copy)
    bounds, rows = np.array([0, 3], dtype=np.int32), np.array([1, 4, 5])
    on = Rectangles(cu_q=bounds, cu_k=bounds, max_q=3, max_k=3, causal=True)
    stage = AttentionStage(on=on, queries=slice(0, 3), keys=rows)
    (found, nothing), same = record_to_device(((stage, None), rows), "cpu")
    assert copies == [2]
    assert nothing is None and found.queries == slice(0, 3) and found.on.max_q == 3
    assert found.on.cu_q is found.on.cu_k and found.keys is same
    assert found.on.cu_q.dtype == torch.int32 and found.keys.tolist() == [1, 4, 5]
    assert isinstance(stage.keys, np.ndarray), "the record itself is as it was"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_nobody_waits():
    torch.cuda.set_sync_debug_mode("error")
    try:
        tensors = copy_to_device(ARRAYS, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check(tensors)
