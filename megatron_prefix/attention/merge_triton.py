"""The log-sum-exp merge as one Triton kernel (see `merge.py`).

A program merges some rows of one head, with the whole head dimension: it reads both sides once and
writes over the first. Rows may be chosen by an index, so nothing is gathered or scattered apart.

The merged lse goes to a buffer of its own. A program may have fewer rows than threads, so several
threads read the same lse, and where one has written it back the others would read that (seen on an
H100). An element of out belongs to one thread, since a program has more of them than threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096
"""Of out, per program."""


@triton.jit
def _merge_kernel(
    out,
    lse,
    other_out,
    other_lse,
    merged_lse,
    rows,
    num_rows,
    num_heads,
    out_row,
    out_head,
    lse_row,
    lse_head,
    other_row,
    other_head,
    other_lse_row,
    other_lse_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CHOSEN: tl.constexpr,
):
    # int64: a packed row of all heads can have more than 2^31 elements.
    head = tl.program_id(1).to(tl.int64)
    source = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    is_row = source < num_rows
    is_element = is_row[:, None] & (dim < HEAD_DIM)[None, :]
    target = tl.load(rows + source, mask=is_row, other=0) if CHOSEN else source

    lse_a = tl.load(lse + target * lse_row + head * lse_head, mask=is_row, other=0.0)
    lse_b = tl.load(
        other_lse + source * other_lse_row + head * other_lse_head, mask=is_row, other=0.0
    ).to(tl.float32)
    largest = tl.maximum(lse_a, lse_b)
    # Two sides without any key: -inf - -inf would be NaN.
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    weight_a = tl.exp(lse_a - shift)
    weight_b = tl.exp(lse_b - shift)
    total = weight_a + weight_b
    tl.store(merged_lse + source * num_heads + head, shift + tl.log(total), mask=is_row)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    weight_a = (weight_a * inverse)[:, None]
    weight_b = (weight_b * inverse)[:, None]

    out_at = out + target[:, None] * out_row + head * out_head + dim[None, :]
    a = tl.load(out_at, mask=is_element, other=0.0).to(tl.float32)
    b = tl.load(
        other_out + source[:, None] * other_row + head * other_head + dim[None, :],
        mask=is_element,
        other=0.0,
    ).to(tl.float32)
    # A side that weighs nothing may hold anything, even NaN.
    merged = tl.where(weight_a > 0.0, a * weight_a, 0.0)
    merged += tl.where(weight_b > 0.0, b * weight_b, 0.0)
    tl.store(out_at, merged.to(out.dtype.element_ty), mask=is_element)


def merge_with_triton(
    out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor, rows: Tensor | None
) -> None:
    """`merge_` for lse in float32, and out and other_out in float32 or narrower."""
    num_rows, num_heads, head_dim = other_out.shape
    if out.stride(-1) != 1 or other_out.stride(-1) != 1:
        raise ValueError(
            f"out has strides {out.stride()} and other_out {other_out.stride()}: the last "
            "dimension must be contiguous"
        )
    if num_rows == 0:
        return
    block_dim = triton.next_power_of_2(head_dim)
    block_rows = max(1, _ELEMENTS // block_dim)
    merged_lse = lse.new_empty(num_rows, num_heads)
    with torch.cuda.device_of(out):
        _merge_kernel[triton.cdiv(num_rows, block_rows), num_heads](
            out,
            lse,
            other_out,
            other_lse,
            merged_lse,
            lse if rows is None else rows,
            num_rows,
            num_heads,
            out.stride(0),
            out.stride(1),
            lse.stride(0),
            lse.stride(1),
            other_out.stride(0),
            other_out.stride(1),
            other_lse.stride(0),
            other_lse.stride(1),
            HEAD_DIM=head_dim,
            BLOCK_ROWS=block_rows,
            BLOCK_DIM=block_dim,
            CHOSEN=rows is not None,
        )
    lse[slice(None) if rows is None else rows] = merged_lse
