"""`p2p`: shards go round a ring, one at a time."""

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


class RingAttention(torch.autograd.Function):
    """Saves q, k, v, out and lse of this rank's row."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, layer: RankLayer
    ) -> Tensor:
        """Attend to one shard while the next one comes in."""
        ctx.layer = layer
        compute, exchange, record = layer.compute, layer.exchange, layer.forward_traffic
        held = layer.shard(k, v)
        out = lse = None
        for step in range(exchange.size):
            source = (exchange.rank - step) % exchange.size
            pending = None
            if step + 1 < exchange.size:
                coming = exchange.shard_tokens[(source - 1) % exchange.size]
                pending = exchange.rotate(held, coming, record)
            if step == 0:
                out, lse = compute.attend(layer.stages.local, q, k, v, wide=True)
            compute.merge(layer.stages.ring[source], q, *keys_and_values(held, k), out, lse)
            if pending is not None:
                held = pending.wait()
        return save_for_backward(ctx, q, k, v, out, lse, sink)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Shards go round again, each followed by its gradient, which ends on its own rank."""
        merged, k, v, d_sink = saved_for_backward(ctx, dout)
        layer, wide = ctx.layer, merged.lse.dtype
        compute, exchange, record = layer.compute, layer.exchange, layer.backward_traffic
        held = layer.shard(k, v)
        travelling = None  # the gradient of the shard that the last step attended to
        for step in range(exchange.size):
            source = (exchange.rank - step) % exchange.size
            coming = exchange.shard_tokens[(source - 1) % exchange.size]
            pending = None
            if step + 1 < exchange.size:
                pending = exchange.rotate(held, coming, record)
            stages, keys = layer.stages.ring[source], keys_and_values(held, k)
            if step == 0:
                dq, dk, dv = compute.shares(layer.stages.local, merged, k, v, wide=True)
                n = exchange.own_tokens
                compute.add_shares(stages, merged, *keys, dq, dk[:n], dv[:n])
            else:
                d_held = torch.zeros_like(held, dtype=wide)
                compute.add_shares(stages, merged, *keys, dq, *keys_and_values(d_held, k))
                if travelling is not None:
                    d_held += travelling.wait()
                travelling = exchange.rotate(d_held, coming, record)
            if pending is not None:
                held = pending.wait()
        if travelling is not None:
            add_to_shard(dk, dv, travelling.wait())
        return *gradients_like((dq, dk, dv), (merged.q, k, v)), d_sink, None
