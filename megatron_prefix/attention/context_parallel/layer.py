"""What the kinds of communication have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prefix.attention.exchange import Exchange, Recorder
from megatron_prefix.attention.stage_compute import StageCompute
from megatron_prefix.layout import RowStages


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerExchange:
    """What one layer sends to other ranks and receives."""

    number: int
    """Of the layer in the whole model: what its traffic is counted under."""
    exchange: Exchange

    @property
    def forward_traffic(self) -> Recorder:
        """Counts the bytes of this layer's forward."""
        return self.exchange.recorder(self.number, "forward")

    @property
    def backward_traffic(self) -> Recorder:
        """Counts the bytes of this layer's backward."""
        return self.exchange.recorder(self.number, "backward")


@dataclass(frozen=True, kw_only=True, eq=False)
class RankLayer(LayerExchange):
    """A layer's attention on one rank of several."""

    stages: RowStages[Tensor]
    compute: StageCompute

    def shard(self, k: Tensor, v: Tensor) -> Tensor:
        """[n, Hk, D + Dv] contiguous, of its own memory: the keys and values that travel."""
        n = self.exchange.own_tokens
        return torch.cat((k[:n], v[:n]), dim=2)


def keys_and_values(shard: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Views [m, Hk, D] and [m, Hk, Dv] of keys as large as k, and values, that have travelled."""
    return shard.tensor_split([k.shape[2]], dim=2)


def add_to_shard(dk: Tensor, dv: Tensor, d_shard: Tensor) -> None:
    """Add the gradient [n, Hk, D + Dv] of the rank's shard to dk and dv of its row."""
    n = d_shard.shape[0]
    for total, share in zip((dk, dv), keys_and_values(d_shard, dk), strict=True):
        total[:n] += share
