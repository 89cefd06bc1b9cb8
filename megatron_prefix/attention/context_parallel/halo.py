"""Halos, of sliding windows and of convolutions: their rows travel, each once to each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_prefix.attention.context_parallel.layer import LayerExchange, keys_and_values
from megatron_prefix.attention.exchange import Recorder
from megatron_prefix.attention.stage_compute import sum_of_copies
from megatron_prefix.layout.stages import HaloRows


@dataclass(frozen=True, kw_only=True, eq=False)
class RankHalo:
    """The `Halo` of a rank: rows of other ranks, whatever the kind of communication."""

    rows: HaloRows[Tensor]
    layer: LayerExchange

    def extend(self, k: Tensor, v: Tensor, *, in_backward: bool) -> tuple[Tensor, Tensor]:
        """See `Halo.extend`. Rows come in again in backward."""
        record = self.layer.backward_traffic if in_backward else self.layer.forward_traffic
        sent = torch.cat((k[self.rows.rows], v[self.rows.rows]), dim=2)
        received = keys_and_values(_receive(sent, self.rows, self.layer, record), k)
        return tuple(torch.cat(parts) for parts in zip((k, v), received, strict=True))

    def give_back(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """See `Halo.give_back`. Each rank adds up what comes back for its rows."""
        num_own = len(gradients[0]) - self.rows.num_received
        own, received = zip(*(x.tensor_split([num_own]) for x in gradients), strict=True)
        came_back = _give_back(torch.cat(received, dim=2), self.rows, self.layer)
        shares = keys_and_values(came_back, gradients[0])
        return [x + share for x, share in zip(own, shares, strict=True)]


def with_halo(x: Tensor, rows: HaloRows[Tensor], layer: LayerExchange) -> Tensor:
    """[T, ...] of this rank's tokens -> the same, and behind them the rows from other ranks.

    Collective, backward too.
    """
    return _WithHalo.apply(x, rows, layer)


class _WithHalo(torch.autograd.Function):
    """Keeps nothing for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: HaloRows[Tensor], layer: LayerExchange) -> Tensor:
        """x and the rows that come in."""
        ctx.rows, ctx.layer = rows, layer
        return torch.cat((x, _receive(x[rows.rows], rows, layer, layer.forward_traffic)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the rank's own rows, with what comes back for them."""
        own, received = dx.tensor_split([len(dx) - ctx.rows.num_received])
        return own + _give_back(received, ctx.rows, ctx.layer).to(own.dtype), None, None


def _receive(
    sent: Tensor, rows: HaloRows[Tensor], layer: LayerExchange, record: Recorder
) -> Tensor:
    """The rows of other ranks, for those that are sent to them."""
    return layer.exchange.send_rows(sent, rows.sent, rows.received, record)


def _give_back(gradients: Tensor, rows: HaloRows[Tensor], layer: LayerExchange) -> Tensor:
    """Of this rank's rows, the gradients that come back for those of received rows."""
    # The same numbers of rows, the other way round.
    came_back = layer.exchange.send_rows(
        gradients.contiguous(), rows.received, rows.sent, layer.backward_traffic
    )
    wide = torch.promote_types(came_back.dtype, torch.float32)
    return sum_of_copies(came_back.to(wide), rows.copies)
