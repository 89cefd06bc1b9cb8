"""A layer with a sliding window: only the rows of halos travel, each once to each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prefix.attention.context_parallel.layer import RankLayer, keys_and_values
from megatron_prefix.attention.stage_compute import sum_of_copies
from megatron_prefix.layout.stages import HaloRows


@dataclass(frozen=True, kw_only=True, eq=False)
class RankHalo:
    """The `Halo` of a rank: rows of other ranks, whatever the kind of communication."""

    rows: HaloRows[Tensor]
    layer: RankLayer

    def extend(self, k: Tensor, v: Tensor, *, in_backward: bool) -> tuple[Tensor, Tensor]:
        """See `Halo.extend`. Rows come in again in backward."""
        rows, layer = self.rows, self.layer
        record = layer.backward_traffic if in_backward else layer.forward_traffic
        sent = torch.cat((k[rows.rows], v[rows.rows]), dim=2)
        received = layer.exchange.send_rows(sent, rows.sent, rows.received, record)
        received = keys_and_values(received, k)
        return tuple(torch.cat(parts) for parts in zip((k, v), received, strict=True))

    def give_back(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """See `Halo.give_back`. Each rank adds up what comes back for its rows."""
        rows, layer = self.rows, self.layer
        num_own = len(gradients[0]) - rows.num_received
        own, received = zip(*(x.tensor_split([num_own]) for x in gradients), strict=True)
        # The same numbers of rows, the other way round.
        came_back = layer.exchange.send_rows(
            torch.cat(received, dim=2), rows.received, rows.sent, layer.backward_traffic
        )
        shares = keys_and_values(sum_of_copies(came_back, rows.copies), gradients[0])
        return [x + share for x, share in zip(own, shares, strict=True)]
