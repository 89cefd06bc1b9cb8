"""Exact attention over a packed row with shared prefixes: stages, merged by log-sum-exp.

A token's keys lie in several stages, its own segment and each ancestor level. Each stage returns
its out and lse over its own keys; two are merged by

    lse = log(exp(lse_a) + exp(lse_b))        out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

Backward needs no such merge: a stage's backward with the merged out and lse yields that stage's
share of dq, dk and dv, and the shares add up (see `Kernel.backward`).

Shapes: T packed tokens, H query heads, Hk key/value heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_prefix.attention.kernels import Kernel
from megatron_prefix.attention.stages import AttentionPlan


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float, kernel: Kernel
) -> Tensor:
    """Attention in which every token sees its ancestors' segments, and its own causally.

    Args:
        q: [T, H, D]; k and v: [T, Hk, D] with H a multiple of Hk. Views are not copied as long as
            their last dimension is contiguous.
        plan: the stages of this packed row, on q's device.
        scale: factor of q k^T before the softmax.
        kernel: what computes a stage, from `select_kernel`.

    Returns:
        [T, H, D] in q's dtype. Merging, and adding up gradients of more than one stage, is done in
        float32 or wider, always in the same order.

    Raises:
        ValueError: the shapes or dtypes of q, k, v and the plan do not belong together.
    """
    _check(q, k, v, plan)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _PrefixAttention.apply(q, k, v, plan, scale, kernel)


class _PrefixAttention(torch.autograd.Function):
    """Saves q, k, v, out [T, H, D] and lse [T, H], whatever the number of stages."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan,
        scale: float,
        kernel: Kernel,
    ) -> Tensor:
        """Compute the self stage into the packed output, then merge the cross stages into it."""
        for stage in plan.stages:
            stage_out, stage_lse = kernel.forward(
                q[stage.queries],
                k[stage.keys],
                v[stage.keys],
                stage.cu_q,
                stage.cu_k,
                stage.max_q,
                stage.max_k,
                causal=stage.causal,
                scale=scale,
            )
            if stage is plan.stages[0]:
                lse = stage_lse
                out = stage_out.to(lse.dtype) if len(plan.stages) > 1 else stage_out
            else:
                merge_(out[stage.queries], lse[stage.queries], stage_out, stage_lse)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale, ctx.kernel = plan, scale, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Add up the stages' shares of dq, dk and dv, in the order of the stages."""
        q, k, v, out, lse = ctx.saved_tensors
        dout = dout.contiguous()
        stages = ctx.plan.stages
        for stage in stages:
            dq_share, dk_share, dv_share = ctx.kernel.backward(
                dout[stage.queries],
                q[stage.queries],
                k[stage.keys],
                v[stage.keys],
                out[stage.queries],
                lse[stage.queries],
                stage.cu_q,
                stage.cu_k,
                stage.max_q,
                stage.max_k,
                causal=stage.causal,
                scale=ctx.scale,
            )
            if stage is stages[0]:
                wide = lse.dtype if len(stages) > 1 else q.dtype
                dq, dk, dv = dq_share.to(wide), dk_share.to(wide), dv_share.to(wide)
            else:
                dq[stage.queries] += dq_share
                dk[stage.keys] += dk_share
                dv[stage.keys] += dv_share
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def merge_(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Merge attention over other keys into out [n, H, D] and lse [n, H], in place.

    `out` is in the dtype of the lse's, float32 or wider; `other_out` may be narrower.
    """
    other_weight = torch.sigmoid(other_lse - lse)  # exp(other_lse - logaddexp(lse, other_lse))
    out.lerp_(other_out.to(out.dtype), other_weight.unsqueeze(-1))
    torch.logaddexp(lse, other_lse, out=lse)


def _check(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 3:
        raise ValueError(f"{shapes}: expected [tokens, heads, head_dim] for each")
    if not q.shape[0] == k.shape[0] == v.shape[0] == plan.num_tokens:
        raise ValueError(f"{shapes}: the attention plan is for {plan.num_tokens} tokens")
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
