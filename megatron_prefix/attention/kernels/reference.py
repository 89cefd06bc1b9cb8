"""The oracle: dense attention, one rectangle at a time, in float32 or wider."""

from __future__ import annotations

from collections.abc import Iterator

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


class ReferenceKernel:
    """Materialises the scores of every rectangle. Any device, dtype and head dimension."""

    name = "reference"
    automatic = False
    windows = True
    value_sizes = True

    def unsupported(self, inputs: KernelInputs) -> str | None:
        """See `Kernel.unsupported`. It always is deterministic."""
        dtype = inputs.dtype
        return None if dtype.is_floating_point else f"dtype {dtype} is not a floating-point type"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, on: Rectangles, options: CallOptions
    ) -> OutAndLse:
        """See `Kernel.forward`."""
        wide = torch.promote_types(q.dtype, torch.float32)
        shape = (*q.shape[:2], v.shape[2])
        out, lse = q.new_empty(shape, dtype=wide), q.new_empty(q.shape[:2], dtype=wide)
        for queries, keys in _slices(on):
            scores = _scores(q[queries], k[keys], wide, on, options.scale)
            lse[queries] = scores.logsumexp(-1).T
            values = _to_query_heads(v[keys], q, wide)
            out[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        return out, lse

    def backward(
        self, merged: MergedAttention, k: Tensor, v: Tensor, on: Rectangles, options: CallOptions
    ) -> Gradients:
        """See `Kernel.backward`. It always is deterministic."""
        q, lse, wide = merged.q, merged.lse, merged.lse.dtype
        dout, out = merged.dout.to(wide), merged.out.to(wide)
        dq, dk, dv = (x.new_zeros(x.shape, dtype=wide) for x in (q, k, v))
        for queries, keys in _slices(on):
            scores = _scores(q[queries], k[keys], wide, on, options.scale)
            p = torch.exp(scores - lse[queries].T[:, :, None])
            dp = torch.einsum("qhd,khd->hqk", dout[queries], _to_query_heads(v[keys], q, wide))
            ds = p * (dp - (dout * out)[queries].sum(-1).T[:, :, None]) * options.scale
            dq[queries] = torch.einsum("hqk,khd->qhd", ds, _to_query_heads(k[keys], q, wide))
            dk[keys] = _to_key_heads(torch.einsum("hqk,qhd->khd", ds, q[queries].to(wide)), k)
            dv[keys] = _to_key_heads(torch.einsum("hqk,qhd->khd", p, dout[queries]), k)
        return dq, dk, dv


def _slices(on: Rectangles) -> Iterator[tuple[slice, slice]]:
    """Queries and keys of each rectangle."""
    q_bounds, k_bounds = on.cu_q.tolist(), on.cu_k.tolist()
    for i in range(len(q_bounds) - 1):
        yield slice(*q_bounds[i : i + 2]), slice(*k_bounds[i : i + 2])


def _scores(q: Tensor, k: Tensor, wide: torch.dtype, on: Rectangles, scale: float) -> Tensor:
    """scale q k^T of one rectangle [H, nq, nk], -inf where the mask hides a key."""
    scores = scale * torch.einsum("qhd,khd->hqk", q.to(wide), _to_query_heads(k, q, wide))
    if on.causal:
        everywhere = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
        own = k.shape[0] - q.shape[0]  # the first query's own key; 0 in a square
        hidden = everywhere.triu(own + 1)
        if on.window is not None:
            hidden |= everywhere.tril(own - on.window - 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores


def _to_query_heads(x: Tensor, q: Tensor, wide: torch.dtype) -> Tensor:
    """[n, Hk, D] -> [n, H, D]: every key/value head once per query head that reads it."""
    return x.to(wide).repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _to_key_heads(x: Tensor, k: Tensor) -> Tensor:
    """[n, H, D] -> [n, Hk, D]: the sum over the query heads of each key/value head."""
    return x.unflatten(1, (k.shape[1], -1)).sum(2)
