"""What the adapters of CUDA kernels have in common: limits, empty calls, layouts of the lse.

These kernels differ from the contract of `base.py` in three ways that are evened out here:

- Their lse is [H, tq], or [n, H, max_q] with padding in older ones.
- They need at least one query. Calls without queries do not reach them.
- With max_q = 1 and shared key/value heads, some take a path that reads exactly one query from each
  rectangle, whatever cu_q says. They are told 2, since max_q only has to be large enough.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from megatron_prefix.attention.kernels.base import (
    CallOptions,
    Gradients,
    KernelInputs,
    MergedAttention,
    OutAndLse,
    Rectangles,
)

HALF_DTYPES = (torch.bfloat16, torch.float16)


def unsupported_inputs(inputs: KernelInputs, *, max_head_dim: int) -> str | None:
    """Why no such kernel takes these inputs, as the end of a sentence; None if one may."""
    device, dtype, head_dim = inputs.device, inputs.dtype, inputs.head_dim
    if device.type != "cuda":
        return f"device {device} is not a CUDA device"
    if torch.version.hip is not None:
        return "this torch is built for ROCm, which is not supported"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if dtype not in HALF_DTYPES:
        return f"{dtype} is none of {', '.join(map(str, HALF_DTYPES))}"
    if head_dim % 8 or not 0 < head_dim <= max_head_dim:
        return f"head_dim {head_dim} is not a multiple of 8 up to {max_head_dim}"
    return None


class CudaVarlenKernel:
    """`Kernel` on top of a CUDA kernel's own two calls, which subclasses make."""

    automatic = True
    windows = False
    value_sizes = False

    def run_forward(
        self, q: Tensor, k: Tensor, v: Tensor, on: Rectangles, options: CallOptions
    ) -> OutAndLse:
        """`forward` with at least one query, and `max_q` and `max_k` at least 2.

        Returns:
            out [tq, H, D] in q's dtype and lse [tq, H] in float32.
        """
        raise NotImplementedError

    def run_backward(
        self, merged: MergedAttention, k: Tensor, v: Tensor, on: Rectangles, options: CallOptions
    ) -> Gradients:
        """`backward` of such a call: dout and out are in q's dtype, lse in float32."""
        raise NotImplementedError

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, on: Rectangles, options: CallOptions
    ) -> OutAndLse:
        """See `Kernel.forward`."""
        if q.shape[0] == 0:
            return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
        return self.run_forward(q, k, v, _at_least_two(on), options)

    def backward(
        self, merged: MergedAttention, k: Tensor, v: Tensor, on: Rectangles, options: CallOptions
    ) -> Gradients:
        """See `Kernel.backward`."""
        q = merged.q
        if q.shape[0] == 0:
            return q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
        narrow = MergedAttention(
            dout=merged.dout.to(q.dtype),
            q=q,
            out=merged.out.to(q.dtype),
            lse=merged.lse.to(torch.float32),
        )
        return self.run_backward(narrow, k, v, _at_least_two(on), options)


def _at_least_two(on: Rectangles) -> Rectangles:
    return dataclasses.replace(on, max_q=max(on.max_q, 2), max_k=max(on.max_k, 2))


def lse_from_heads(lse: Tensor) -> Tensor:
    """[H, tq] -> [tq, H], a view."""
    return lse.transpose(0, 1)


def lse_to_heads(lse: Tensor) -> Tensor:
    """[tq, H] -> [H, tq], contiguous. No copy of what `lse_from_heads` gave for the same tokens."""
    return lse.transpose(0, 1).contiguous()


def lse_from_padded(lse: Tensor, cu_q: Tensor, num_queries: int) -> Tensor:
    """[n, H, max_q] -> [num_queries, H]."""
    rectangles, offsets = _padded_places(cu_q, num_queries)
    return lse[rectangles, :, offsets]


def lse_to_padded(lse: Tensor, cu_q: Tensor, max_q: int) -> Tensor:
    """[tq, H] -> [n, H, max_q], padded with zeros."""
    rectangles, offsets = _padded_places(cu_q, lse.shape[0])
    padded = lse.new_zeros(len(cu_q) - 1, lse.shape[1], max_q)
    padded[rectangles, :, offsets] = lse
    return padded


def _padded_places(cu_q: Tensor, num_queries: int) -> tuple[Tensor, Tensor]:
    """[num_queries] each: the rectangle of every query, and its place there.

    On the device alone, without waiting for it.
    """
    cu_q = cu_q.long()
    rectangles = torch.repeat_interleave(
        torch.arange(len(cu_q) - 1, device=cu_q.device), cu_q.diff(), output_size=num_queries
    )
    offsets = torch.arange(num_queries, device=cu_q.device) - cu_q[rectangles]
    return rectangles, offsets
