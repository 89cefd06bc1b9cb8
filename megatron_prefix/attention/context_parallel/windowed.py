"""A layer with a sliding window: only the rows of halos travel, each once to each rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_prefix.attention.context_parallel.layer import RankLayer
from megatron_prefix.attention.exchange import Recorder
from megatron_prefix.attention.stage_compute import (
    gradients_like,
    save_for_backward,
    saved_for_backward,
    sum_of_copies,
)


class WindowedAttention(torch.autograd.Function):
    """Saves q, k, v, out and lse of this rank's row; halos come in again in backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, layer: RankLayer
    ) -> Tensor:
        """Attend to the row's keys and to those of its halos."""
        ctx.layer = layer
        keys, values = _with_halo(k, v, layer, layer.forward_traffic)
        stages = (layer.stages.windowed.stage,)
        out, lse = layer.compute.attend(stages, q, keys, values, wide=False)
        return save_for_backward(ctx, q, k, v, out, lse, sink)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of received rows go back to their ranks, which add them up."""
        merged, k, v, d_sink = saved_for_backward(ctx, dout)
        layer, record = ctx.layer, ctx.layer.backward_traffic
        keys, values = _with_halo(k, v, layer, record)
        stages = (layer.stages.windowed.stage,)
        dq, *d_keys = layer.compute.shares(stages, merged, keys, values, wide=False)
        halo = layer.stages.windowed.halo
        if halo is not None:
            own, received = zip(*(x.tensor_split([len(k)]) for x in d_keys), strict=True)
            # What came is sent back: the same numbers of rows, the other way round.
            came_back = layer.exchange.send_rows(
                torch.stack(received, dim=1).to(merged.lse.dtype), halo.received, halo.sent, record
            )
            d_sent = sum_of_copies(came_back, halo.copies).unbind(1)
            d_keys = [x + shares for x, shares in zip(own, d_sent, strict=True)]
        return *gradients_like((dq, *d_keys), (merged.q, k, v)), d_sink, None


def _with_halo(k: Tensor, v: Tensor, layer: RankLayer, record: Recorder) -> tuple[Tensor, Tensor]:
    """[C + received, Hk, D] the keys and values of the row, and those of its halos behind them."""
    halo = layer.stages.windowed.halo
    if halo is None:
        return k, v
    sent = torch.stack((k[halo.rows], v[halo.rows]), dim=1)
    received = layer.exchange.send_rows(sent, halo.sent, halo.received, record)
    return tuple(torch.cat(parts) for parts in zip((k, v), received.unbind(1), strict=True))
