"""Exact attention over a packed row with shared prefixes: stages, merged by log-sum-exp.

Shapes: T packed tokens, N of them attend (all, but for a trimmed last layer), H query heads, Hk
key/value heads, D head dimension, Dv that of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_prefix.attention.halo import Halo
from megatron_prefix.attention.kernels import Kernel
from megatron_prefix.attention.root_keys import LayerRootKeys, RootHalo, RootStage
from megatron_prefix.attention.stage_compute import (
    StageCompute,
    gradients_like,
    save_for_backward,
    saved_for_backward,
)
from megatron_prefix.layout import AttentionStage, RowStages


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stages: RowStages[Tensor],
    *,
    scale: float,
    kernel: Kernel,
    deterministic: bool = False,
    root: LayerRootKeys | None = None,
    windowed: bool = False,
    sink: Tensor | None = None,
) -> Tensor:
    """Attention in which every token sees its ancestors' segments, and its own causally.

    Args:
        q: [N, H, D], with N = T unless the stages are trimmed; k: [T, Hk, D] with H a multiple of
            Hk; v: [T, Hk, Dv] with Dv at most D. Views are not copied as long as their last
            dimension is contiguous.
        stages: of this packed row, on q's device.
        scale: factor of q k^T before the softmax.
        kernel: what computes a stage, from `select_kernel`.
        deterministic: the same inputs give the same gradients, to the bit. The kernel must have
            been selected for it.
        root: keys of a root that an earlier row has run, where the stages have one for them.
        windowed: within the sliding window that the stages were planned for.
        sink: [H] the score of one more key of each query head, whose value is zero; None: none.

    Returns:
        [N, H, Dv] in q's dtype. Merging, and adding up gradients of more than one stage, is done in
        float32 or wider, always in the same order.

    Raises:
        ValueError: the shapes or dtypes of q, k, v and the stages do not belong together.
    """
    q, k, v = checked_inputs(q, k, v, stages)
    compute = StageCompute(kernel, scale, deterministic)
    if windowed and stages.windowed is not None:
        of_window, halo = stages.windowed, None
        assert of_window.halo is None
        if of_window.root_rows:
            assert root is not None
            halo = RootHalo(keys=root, num_rows=of_window.root_rows)
        return attend_to_row(q, k, v, (of_window.stage,), compute, sink=sink, halo=halo)
    root_stage = None
    if stages.root is not None:
        assert root is not None
        root_stage = RootStage(stage=stages.root, keys=root)
    return attend_to_row(q, k, v, stages.local, compute, root=root_stage, sink=sink)


def attend_to_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stages: Sequence[AttentionStage[Tensor]],
    compute: StageCompute,
    *,
    root: RootStage | None = None,
    sink: Tensor | None = None,
    halo: Halo | None = None,
) -> Tensor:
    """The same from the stages alone: the self stage of all queries, then the cross stages.

    Args:
        root: what is merged after them.
        sink: as above.
        halo: keys from elsewhere that the stages have behind the row's.
    """
    return _PrefixAttention.apply(q, k, v, stages, compute, root, sink, halo)


class _PrefixAttention(torch.autograd.Function):
    """Saves q, k, v, out [N, H, Dv] and lse [N, H], whatever the number of stages."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        stages: Sequence[AttentionStage[Tensor]],
        compute: StageCompute,
        root: RootStage | None,
        sink: Tensor | None,
        halo: Halo | None,
    ) -> Tensor:
        """Compute the self stage into the packed output, then merge the others into it."""
        ctx.stages, ctx.compute, ctx.root, ctx.halo = stages, compute, root, halo
        ctx.wide = len(stages) + (root is not None) > 2
        keys, values = (k, v) if halo is None else halo.extend(k, v, in_backward=False)
        out, lse = compute.attend(stages, q, keys, values, wide=ctx.wide)
        if root is not None:
            root.merge(compute, q, out, lse)
        return save_for_backward(ctx, q, k, v, out, lse, sink)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Add up the stages' shares of dq, dk and dv, in the order of the stages."""
        merged, k, v, d_sink = saved_for_backward(ctx, dout)
        halo = ctx.halo
        keys, values = (k, v) if halo is None else halo.extend(k, v, in_backward=True)
        dq, *d_keys = ctx.compute.shares(ctx.stages, merged, keys, values, wide=ctx.wide)
        if halo is not None:
            d_keys = halo.give_back([x.to(merged.lse.dtype) for x in d_keys])
        if ctx.root is not None:
            ctx.root.add_shares(ctx.compute, merged, dq)
        of_inputs = gradients_like((dq, *d_keys), (merged.q, k, v))
        return *of_inputs, None, None, None, d_sink, None


def checked_inputs(
    q: Tensor, k: Tensor, v: Tensor, stages: RowStages[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with a contiguous last dimension.

    Raises:
        ValueError: they do not fit the stages or each other.
    """
    _check_shapes(q, k, v, num_queries=stages.num_queries, num_tokens=stages.num_tokens)
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, *, num_queries: int, num_tokens: int) -> None:
    """Raise a ValueError unless q [num_queries, heads, head_dim], k and v [num_tokens, ...] fit."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 3:
        raise ValueError(f"{shapes}: expected [tokens, heads, head_dim] for each")
    if not (q.shape[0] == num_queries and k.shape[0] == v.shape[0] == num_tokens):
        queries = "" if num_queries == num_tokens else f" and {num_queries} queries"
        raise ValueError(f"{shapes}: the attention plan is for {num_tokens} tokens{queries}")
    if not q.shape[2] == k.shape[2] >= v.shape[2]:
        raise ValueError(
            f"{shapes}: head_dim {q.shape[2]}, {k.shape[2]}, {v.shape[2]} must be the same for q "
            "and k, and no larger for v"
        )
    if k.shape[1] != v.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{shapes}: k and v must have equally many heads, and q a multiple of them"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: cast them to one dtype")
