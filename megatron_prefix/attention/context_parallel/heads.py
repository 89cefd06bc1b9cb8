"""`a2a`: every rank computes its share of the heads over the whole row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_prefix.attention.context_parallel.layer import LayerExchange, RankLayer
from megatron_prefix.attention.exchange import Exchange, Recorder
from megatron_prefix.attention.function import attend_to_row
from megatron_prefix.layout.rows import WholeRow

_Way = Callable[[Tensor, WholeRow[Tensor], Exchange, Recorder], Tensor]


def attend_by_heads(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, layer: RankLayer
) -> Tensor:
    """[N, H, Dv] the attention of this rank's queries."""
    kept = layer.stages.queries
    if kept is not None:  # heads are exchanged for all tokens of the row
        q = q.new_zeros(layer.stages.num_tokens, *q.shape[1:]).index_copy(0, kept, q)
    size = layer.exchange.size
    # One message: rank i's query heads, key heads and value heads side by side.
    parts = [x.unflatten(1, (size, -1)).flatten(2) for x in (q, k, v)]
    whole_row = layer.stages.whole_row
    row = to_packed_row(torch.cat(parts, dim=2), whole_row, layer)
    of_heads = [
        part.unflatten(1, (-1, x.shape[2]))
        for part, x in zip(row.split([x.shape[2] for x in parts], dim=1), (q, k, v), strict=True)
    ]
    if sink is not None:
        sink = sink.unflatten(0, (size, -1))[layer.exchange.rank]
    out = attend_to_row(*of_heads, whole_row.stages, layer.compute, sink=sink).flatten(1)
    out = from_packed_row(out, whole_row, layer).unflatten(2, (-1, v.shape[2])).flatten(1, 2)
    return out if kept is None else out[kept]


def to_packed_row(x: Tensor, row: WholeRow[Tensor], layer: LayerExchange) -> Tensor:
    """This rank's row of all heads [C, ranks, n] -> the packed row of its heads [T, n]. Gradients
    come back the opposite way."""
    return _Move.apply(x, row, layer, _to_packed_row, _from_packed_row)


def from_packed_row(x: Tensor, row: WholeRow[Tensor], layer: LayerExchange) -> Tensor:
    """The way back: [T, n] -> [C, ranks, n]."""
    return _Move.apply(x, row, layer, _from_packed_row, _to_packed_row)


class _Move(torch.autograd.Function):
    """Tokens and heads to other ranks; gradients come back the opposite way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, row: WholeRow[Tensor], layer: LayerExchange, there: _Way, back: _Way
    ) -> Tensor:
        """x, moved."""
        ctx.row, ctx.layer, ctx.back = row, layer, back
        return there(x, row, layer.exchange, layer.forward_traffic)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        """dx, moved back."""
        moved = ctx.back(dx, ctx.row, ctx.layer.exchange, ctx.layer.backward_traffic)
        return moved, None, None, None, None


def _to_packed_row(
    x: Tensor, row: WholeRow[Tensor], exchange: Exchange, record: Recorder
) -> Tensor:
    parts = exchange.swap(x.transpose(0, 1).contiguous(), record)
    return parts.flatten(0, 1)[row.from_ranks]


def _from_packed_row(
    x: Tensor, row: WholeRow[Tensor], exchange: Exchange, record: Recorder
) -> Tensor:
    parts = x[row.to_ranks].unflatten(0, (exchange.size, -1))
    return exchange.swap(parts, record).transpose(0, 1)
