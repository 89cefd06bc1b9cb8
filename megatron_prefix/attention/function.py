"""Exact attention over a packed row with shared prefixes: stages, merged by log-sum-exp.

A token's keys lie in several stages, its own segment and each ancestor level. Each stage returns
its out and lse over its own keys, which `merge.py` merges. Backward needs no such merge: a stage's
backward with the merged out and lse yields that stage's share of dq, dk and dv, and the shares add
up (see `Kernel.backward`).

Shapes: T packed tokens, N of them attend (all, but for a trimmed last layer), H query heads, Hk
key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_prefix.attention.kernels import Kernel
from megatron_prefix.attention.merge import merge_
from megatron_prefix.attention.stages import AttentionPlan, StageTensors


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    kernel: Kernel,
    deterministic: bool = False,
) -> Tensor:
    """Attention in which every token sees its ancestors' segments, and its own causally.

    Args:
        q: [N, H, D], with N = T unless the plan is trimmed; k and v: [T, Hk, D] with H a multiple
            of Hk. Views are not copied as long as their last dimension is contiguous.
        plan: the stages of this packed row, on q's device.
        scale: factor of q k^T before the softmax.
        kernel: what computes a stage, from `select_kernel`.
        deterministic: the same inputs give the same gradients, to the bit. The kernel must have
            been selected for it.

    Returns:
        [N, H, D] in q's dtype. Merging, and adding up gradients of more than one stage, is done in
        float32 or wider, always in the same order.

    Raises:
        ValueError: the shapes or dtypes of q, k, v and the plan do not belong together.
    """
    check_shapes(q, k, v, num_queries=plan.num_queries, num_tokens=plan.num_tokens)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _PrefixAttention.apply(q, k, v, plan, StageCompute(kernel, scale, deterministic))


class _PrefixAttention(torch.autograd.Function):
    """Saves q, k, v, out [N, H, D] and lse [N, H], whatever the number of stages."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan,
        compute: StageCompute,
    ) -> Tensor:
        """Compute the self stage into the packed output, then merge the cross stages into it."""
        self_stage, *cross_stages = plan.stages
        out, lse = compute.first(self_stage, q, k, v, wide=len(cross_stages) > 1)
        compute.merge(cross_stages, q, k, v, out, lse)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.compute = plan, compute
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Add up the stages' shares of dq, dk and dv, in the order of the stages."""
        q, k, v, out, lse = ctx.saved_tensors
        merged = MergedAttention(q=q, out=out, lse=lse, dout=dout.contiguous())
        self_stage, *cross_stages = ctx.plan.stages
        wide = len(cross_stages) > 1
        dq, dk, dv = ctx.compute.first_shares(self_stage, merged, k, v, wide=wide)
        ctx.compute.add_shares(cross_stages, merged, k, v, dq, dk, dv)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


@dataclass(frozen=True, kw_only=True)
class MergedAttention:
    """What the backward of every stage reads of the queries: out and lse over all their keys."""

    q: Tensor
    """[N, H, D]"""
    out: Tensor
    """[N, H, D]"""
    lse: Tensor
    """[N, H]"""
    dout: Tensor
    """[N, H, D], contiguous"""


@dataclass(frozen=True)
class StageCompute:
    """Stages through one kernel: forward merged, backward added up.

    What is merged or added into is `wide`, in the lse's dtype, where a row may take part in more
    than two stages. A single merge or addition is computed in float32 whatever the dtypes, so what
    it goes into may be in the kernel's own dtype: it is rounded once either way.
    """

    kernel: Kernel
    scale: float
    deterministic: bool = False

    def first(
        self, stage: StageTensors, q: Tensor, k: Tensor, v: Tensor, *, wide: bool
    ) -> tuple[Tensor, Tensor]:
        """out [N, H, D] and lse [N, H] of a stage of all queries."""
        out, lse = self._forward(stage, q, k, v)
        return (out.to(lse.dtype) if wide else out), lse

    def merge(
        self,
        stages: Iterable[StageTensors],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Merge stages against the keys k, v into out and lse, in place."""
        for stage in stages:
            stage_out, stage_lse = self._forward(stage, q, k, v)
            if isinstance(stage.queries, Tensor):
                merge_(out, lse, stage_out, stage_lse, rows=stage.queries)
            else:
                merge_(out[stage.queries], lse[stage.queries], stage_out, stage_lse)

    def first_shares(
        self, stage: StageTensors, merged: MergedAttention, k: Tensor, v: Tensor, *, wide: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of a stage of all queries, to be added to."""
        dq, *d_keys = self._backward(stage, merged, k, v)
        if wide:
            dq, *d_keys = (share.to(merged.lse.dtype) for share in (dq, *d_keys))
        if d_keys[0].shape[0] < k.shape[0]:
            shares = d_keys
            d_keys = [x.new_zeros(x.shape, dtype=shares[0].dtype) for x in (k, v)]
            for all_keys, share in zip(d_keys, shares, strict=True):
                all_keys[stage.keys] = share
        return dq, *d_keys

    def add_shares(
        self,
        stages: Iterable[StageTensors],
        merged: MergedAttention,
        k: Tensor,
        v: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """Add the stages' shares against the keys k, v to dq, and to dk and dv of these keys."""
        for stage in stages:
            dq_share, dk_share, dv_share = self._backward(stage, merged, k, v)
            dq[stage.queries] += dq_share
            dk[stage.keys] += dk_share
            dv[stage.keys] += dv_share

    def _forward(
        self, stage: StageTensors, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.kernel.forward(
            q[stage.queries],
            k[stage.keys],
            v[stage.keys],
            stage.cu_q,
            stage.cu_k,
            stage.max_q,
            stage.max_k,
            causal=stage.causal,
            scale=self.scale,
        )

    def _backward(
        self, stage: StageTensors, merged: MergedAttention, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.kernel.backward(
            merged.dout[stage.queries],
            merged.q[stage.queries],
            k[stage.keys],
            v[stage.keys],
            merged.out[stage.queries],
            merged.lse[stage.queries],
            stage.cu_q,
            stage.cu_k,
            stage.max_q,
            stage.max_k,
            causal=stage.causal,
            scale=self.scale,
            deterministic=self.deterministic,
        )


def check_shapes(q: Tensor, k: Tensor, v: Tensor, *, num_queries: int, num_tokens: int) -> None:
    """Raise a ValueError unless q [num_queries, heads, head_dim], k and v [num_tokens, ...] fit."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 3:
        raise ValueError(f"{shapes}: expected [tokens, heads, head_dim] for each")
    if not (q.shape[0] == num_queries and k.shape[0] == v.shape[0] == num_tokens):
        queries = "" if num_queries == num_tokens else f" and {num_queries} queries"
        raise ValueError(f"{shapes}: the attention plan is for {num_tokens} tokens{queries}")
    if not q.shape[2] == k.shape[2] == v.shape[2]:
        raise ValueError(
            f"{shapes}: head_dim {q.shape[2]}, {k.shape[2]}, {v.shape[2]} must be the same for q, "
            "k and v"
        )
    if k.shape[1] != v.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{shapes}: k and v must have equally many heads, and q a multiple of them"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: cast them to one dtype")
