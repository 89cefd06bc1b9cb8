"""The start-up check passes every right kernel and names a wrong one.

What these tests do not cover: kernels on a GPU, but where there is one.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_prefix.attention import merge_check, self_check
from megatron_prefix.attention.kernels import Rectangles, select_kernel, usable_kernels
from megatron_prefix.attention.kernels.reference import ReferenceKernel
from megatron_prefix.attention.kernels.torch_cpu import TorchCpuKernel
from megatron_prefix.attention.merge import merge_
from megatron_prefix.attention.self_check import TOLERANCES, KernelCheckError, check_kernel

DTYPES = list(TOLERANCES)
HEADS = {"num_heads": 4, "num_key_heads": 2, "head_dim": 32}


def check(kernel: object, dtype: torch.dtype = torch.float32) -> None:
    check_kernel(kernel, device="cpu", dtype=dtype, **HEADS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["torch_cpu", "reference"])
@pytest.mark.parametrize("head_dim", [16, 80, 128, 256])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (5, 1)])
def test_every_kernel_of_the_cpu_passes(dtype, name, head_dim, heads, key_heads):
    assert set(usable_kernels("cpu", dtype, head_dim)) == {"torch_cpu", "reference"}
    check_kernel(
        select_kernel(name, device="cpu", dtype=dtype, head_dim=head_dim),
        device="cpu",
        dtype=dtype,
        num_heads=heads,
        num_key_heads=key_heads,
        head_dim=head_dim,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["torch_cpu", "reference"])
def test_rows_with_sliding_windows_are_checked_where_the_model_has_them(dtype, name):
    kernel = select_kernel(name, device="cpu", dtype=dtype, head_dim=32, windows=True)
    check_kernel(kernel, device="cpu", dtype=dtype, windows=True, **HEADS)
    short = OneKeyShort()
    check(short, dtype)
    with pytest.raises(KernelCheckError, match=r"in a row with a window of 6 keys .* is off by"):
        check_kernel(short, device="cpu", dtype=dtype, windows=True, **HEADS)


def test_a_merge_that_reads_what_it_has_written_is_told_from_a_wrong_kernel(monkeypatch):
    """As a kernel does whose threads write the merged lse before others have read it."""

    def racing(out, lse, other_out, other_lse, rows=None):
        of_rows = slice(None) if rows is None else rows
        before = lse[of_rows].clone()
        merge_(out, lse, other_out, other_lse, rows=rows)
        late = slice(8, 12)
        merged = lse[of_rows][late]
        weight = torch.sigmoid(other_lse[late] - merged).unsqueeze(-1)
        assert not torch.equal(merged, before[late])
        of_out = torch.arange(len(lse))[of_rows][late]
        out[of_out] = torch.lerp(out[of_out], other_out[late].to(out.dtype), weight.to(out.dtype))

    monkeypatch.setattr(merge_check, "merge_", racing)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(KernelCheckError, match=r"the merge of .* out is off by .*Triton"):
            check(TorchCpuKernel(), dtype)


class OneKeyShort(TorchCpuKernel):
    """A window that ends one key too early, which nothing notices without a window."""

    name = "one_key_short"

    def forward(self, q, k, v, on, options):
        if on.window:
            on = dataclasses.replace(on, window=on.window - 1)
        return super().forward(q, k, v, on, options)


def test_its_rows_hold_what_real_rows_hold():
    whole, trimmed, *ranks = self_check._problems()
    assert any((np.diff(stage.on.cu_q) == 0).any() for stage in whole.stages)
    assert any(isinstance(stage.queries, np.ndarray) for stage in trimmed.stages)
    assert any(isinstance(stage.keys, np.ndarray) for stage in trimmed.stages)
    assert any((np.diff(stage.on.cu_q) == 0).any() for stage in trimmed.stages)
    assert len(ranks) == 2 and all(rank.gathered_stages for rank in ranks)
    assert not whole.wide and trimmed.wide  # merged in the kernel's own dtype, and in float32


class BackwardOffByOnePercent(TorchCpuKernel):
    name = "off_by_one_percent"

    def backward(self, *args, **kwargs):
        return tuple(1.01 * share for share in super().backward(*args, **kwargs))


class LseInBitsOfTwo(TorchCpuKernel):
    name = "lse_of_base_two"

    def forward(self, *args, **kwargs):
        out, lse = super().forward(*args, **kwargs)
        return out, lse / torch.tensor(2.0, dtype=lse.dtype).log()


def without_queries(on: Rectangles) -> Tensor:
    """[tk] bool: keys of rectangles without queries."""
    return torch.repeat_interleave(on.cu_q.diff() == 0, on.cu_k.diff())


class NanForEmptyRectangles(TorchCpuKernel):
    name = "nan_for_empty"

    def backward(self, merged, k, v, on, options):
        dq, dk, dv = super().backward(merged, k, v, on, options)
        dk[without_queries(on)] = torch.nan
        return dq, dk, dv


class NothingWrittenForEmptyRectangles(TorchCpuKernel):
    """What a kernel does that returns early for an empty rectangle, into torch.empty."""

    name = "unwritten_for_empty"

    def backward(self, merged, k, v, on, options):
        dq, dk, dv = super().backward(merged, k, v, on, options)
        written = torch.empty_like(dk)
        rows = ~without_queries(on)
        written[rows] = dk[rows]
        return dq, written, dv


class WrongWhereRowsArePicked(TorchCpuKernel):
    """Wrong for keys that are a copy, as those that a row index has picked, and not a view."""

    name = "wrong_in_trimmed_rows"

    def forward(self, q, k, v, *args, **kwargs):
        out, lse = super().forward(q, k, v, *args, **kwargs)
        return (0.97 * out if k.is_contiguous() else out), lse


class Raises(TorchCpuKernel):
    name = "raises"

    def backward(self, *args, **kwargs):
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with TORCH_USE_...")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        (BackwardOffByOnePercent, r"is wrong: in a whole row d[qkv] is off by 1\.\de-02"),
        (LseInBitsOfTwo, r"is wrong: in a whole row .* in a trimmed last layer .* rank 1 of 2"),
        (NanForEmptyRectangles, r"is wrong: in a whole row dk is off by nan"),
        (NothingWrittenForEmptyRectangles, r"is wrong: in a whole row dk is off by nan"),
    ],
)
def test_a_wrong_kernel_is_named_with_the_numbers(kernel, what, dtype):
    with pytest.raises(KernelCheckError, match=what) as caught:
        check(kernel(), dtype)
    message = str(caught.value)
    assert f"attention kernel '{kernel.name}'" in message
    assert "tolerance " in message and "4 query heads and 2 key heads of 32" in message
    assert "Set training.kernel" in message and message.endswith("torch_cpu, reference")
    assert "\n" not in message


def test_a_kernel_that_is_wrong_only_in_trimmed_rows_is_caught():
    with pytest.raises(KernelCheckError, match="is wrong: in a trimmed last layer") as caught:
        check(WrongWhereRowsArePicked())
    assert "in a whole row" not in str(caught.value)


def test_one_wrong_row_of_many_is_caught():
    """One row of one head is off by 10 %, which is little of all of out."""

    class OneRow(TorchCpuKernel):
        name = "one_row"

        def forward(self, *args, **kwargs):
            out, lse = super().forward(*args, **kwargs)
            out[-1, -1] *= 1.1
            return out, lse

    with pytest.raises(KernelCheckError, match="a row of"):
        check(OneRow(), torch.bfloat16)


def test_a_kernel_that_raises_is_one_line():
    with pytest.raises(KernelCheckError) as caught:
        check(Raises())
    message = str(caught.value)
    assert "'raises' fails with RuntimeError: CUDA error: no kernel image is available." in message
    assert "TORCH_USE" not in message and "Set training.kernel" in message


def test_a_dtype_without_a_tolerance_is_refused():
    with pytest.raises(ValueError, match=r"float8_e4m3fn: kernels are checked in torch\.float64"):
        check(ReferenceKernel(), torch.float8_e4m3fn)


def test_the_callers_random_numbers_are_its_own():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    check(TorchCpuKernel())
    assert torch.equal(torch.rand(3), expected)


def test_it_takes_less_than_a_second():
    """The processor time of a rank of a model of 32 query heads; about 0.2 s as measured."""
    started = time.process_time()
    check_kernel(
        TorchCpuKernel(),
        device="cpu",
        dtype=torch.bfloat16,
        num_heads=32,
        num_key_heads=8,
        head_dim=128,
    )
    assert time.process_time() - started < 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_kernel_of_the_gpu_passes(dtype):
    for windows in (False, True):
        inputs = {"device": "cuda", "dtype": dtype, "head_dim": 64}
        for name in usable_kernels(*inputs.values(), windows=windows):
            kernel = select_kernel(name, **inputs, windows=windows)
            check_kernel(kernel, **{**HEADS, **inputs}, windows=windows)
