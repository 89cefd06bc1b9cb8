"""`all_gather`: the shards of all ranks come in at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_prefix.attention.context_parallel.layer import (
    RankLayer,
    add_to_shard,
    keys_and_values,
)
from megatron_prefix.attention.stage_compute import (
    gradients_like,
    save_for_backward,
    saved_for_backward,
)


class GatheredAttention(torch.autograd.Function):
    """Saves q, k, v, out and lse of this rank's row."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, layer: RankLayer
    ) -> Tensor:
        """Attend locally while the shards come in, then to them."""
        ctx.layer = layer
        compute, gathered = layer.compute, layer.stages.gathered
        pending = layer.exchange.gather(layer.shard(k, v), layer.forward_traffic)
        out, lse = compute.attend(layer.stages.local, q, k, v, wide=True)
        shards = pending.wait()[gathered.source]
        compute.merge(gathered.stages, q, *keys_and_values(shards, k), out, lse)
        return save_for_backward(ctx, q, k, v, out, lse, sink)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Gather again; the shards' gradients travel while the local ones are computed."""
        merged, k, v, d_sink = saved_for_backward(ctx, dout)
        layer, wide = ctx.layer, merged.lse.dtype
        compute, gathered = layer.compute, layer.stages.gathered
        pending = layer.exchange.gather(layer.shard(k, v), layer.backward_traffic)
        dq = torch.zeros_like(merged.q, dtype=wide)
        all_shards = pending.wait()
        shards = all_shards[gathered.source]
        d_shards = torch.zeros_like(shards, dtype=wide)
        of_shards = (*keys_and_values(shards, k), dq, *keys_and_values(d_shards, k))
        compute.add_shares(gathered.stages, merged, *of_shards)
        shares = torch.zeros_like(all_shards, dtype=wide)
        shares[gathered.source] = d_shards
        pending = layer.exchange.reduce(shares, layer.backward_traffic)
        local_dq, dk, dv = compute.shares(layer.stages.local, merged, k, v, wide=True)
        add_to_shard(dk, dv, pending.wait().sum(dim=0))
        return *gradients_like((dq + local_dq, dk, dv), (merged.q, k, v)), d_sink, None
