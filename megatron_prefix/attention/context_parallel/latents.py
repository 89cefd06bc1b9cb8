"""`latent_gather`: latents of all ranks come in at once, and are expanded into keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_prefix.attention.context_parallel.layer import RankLayer
from megatron_prefix.attention.stage_compute import (
    gradients_like,
    save_for_backward,
    saved_for_backward,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentKeys:
    """What keys and values of multi-latent attention are expanded from.

    r is the rank of the latents, p the dimensions of a key that are rotated, which all heads share;
    H heads of this tensor-parallel rank.
    """

    shard: Tensor
    """[n, r + p] of the tokens that other ranks attend to, the rotated part as in the keys."""
    weight: Tensor
    """[H * (key dimensions that are not rotated + value dimensions), r] of the projection."""
    num_heads: int
    value_size: int

    def expand(self, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """[m, r + p] -> keys [m, H, D], and values [m, H, Dv]."""
        latents, rotated = rows.tensor_split([weight.shape[1]], dim=1)
        expanded = F.linear(latents, weight).unflatten(1, (self.num_heads, -1))
        plain, values = expanded.tensor_split([expanded.shape[2] - self.value_size], dim=2)
        keys = torch.cat((plain, rotated[:, None].expand(-1, self.num_heads, -1)), dim=2)
        return keys, values


class LatentAttention(torch.autograd.Function):
    """Saves q, k, v, out and lse of this rank's row; latents come in again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        shard: Tensor,
        weight: Tensor,
        layer: RankLayer,
        latents: LatentKeys,
    ) -> Tensor:
        """Attend locally while the latents come in, then to what they expand to."""
        ctx.layer, ctx.latents = layer, latents
        compute, gathered = layer.compute, layer.stages.gathered
        pending = layer.exchange.gather(shard.contiguous(), layer.forward_traffic)
        out, lse = compute.attend(layer.stages.local, q, k, v, wide=True)
        rows = pending.wait()[gathered.source]
        compute.merge(gathered.stages, q, *latents.expand(rows, weight), out, lse)
        return save_for_backward(ctx, q, k, v, out, lse, sink, shard, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """The latents' gradients travel while the local ones are computed."""
        merged, k, v, d_sink = saved_for_backward(ctx, dout)
        *_, shard, weight = ctx.saved_tensors
        layer, wide = ctx.layer, merged.lse.dtype
        compute, gathered = layer.compute, layer.stages.gathered
        pending = layer.exchange.gather(shard.contiguous(), layer.backward_traffic)
        dq = torch.zeros_like(merged.q, dtype=wide)
        all_rows = pending.wait()
        rows = all_rows[gathered.source].requires_grad_()
        weight = weight.detach().requires_grad_()
        with torch.enable_grad():
            expanded = ctx.latents.expand(rows, weight)
        gradients = [torch.zeros_like(x, dtype=wide) for x in expanded]
        keys = [x.detach() for x in expanded]
        compute.add_shares(gathered.stages, merged, *keys, dq, *gradients)
        d_rows, d_weight = torch.autograd.grad(
            expanded,
            (rows, weight),
            [dx.to(x.dtype) for dx, x in zip(gradients, expanded, strict=True)],
        )
        shares = torch.zeros_like(all_rows, dtype=wide)
        shares[gathered.source] = d_rows.to(wide)
        pending = layer.exchange.reduce(shares, layer.backward_traffic)
        local_dq, dk, dv = compute.shares(layer.stages.local, merged, k, v, wide=True)
        d_shard = pending.wait().sum(dim=0).to(shard.dtype)
        of_row = gradients_like((dq + local_dq, dk, dv), (merged.q, k, v))
        return *of_row, d_sink, d_shard, d_weight, None, None
