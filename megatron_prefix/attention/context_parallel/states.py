"""States of recurrent layers: what ranks' pieces of sharded segments make of them is gathered.

A piece makes the state M S + U of the state S before it. What travels are M and U [K, V] of each
head and piece, whatever the number of their tokens; every rank composes them along the paths. In
backward M travels again, beside the gradients of the states that runs begin with.

Shapes: P pieces of all ranks, in order; H heads, K and V the sizes of keys and values. M is [K, F]:
a matrix, F = K, or a number for each key channel, F = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prefix.attention.context_parallel.layer import LayerExchange
from megatron_prefix.layout.stages import SharedStates


@dataclass(frozen=True, kw_only=True, eq=False)
class RankStates:
    """The states of a row's sharded segments in one layer. Calls are collective."""

    plan: SharedStates[Tensor]
    layer: LayerExchange

    def before_runs(self, maps: Tensor, *, value_size: int) -> Tensor:
        """[begins, H, K, V] the states that runs of this rank begin with.

        Args:
            maps: [own pieces, H, K, F + V] M and U, side by side.
            value_size: V
        """
        plan, size = self.plan, maps.shape[-1] - value_size
        maps = self._of_all_pieces(maps, in_backward=False)
        ends = self._behind_pieces(maps[..., :size], maps[..., size:])
        return ends[plan.begins[plan.own_begins]]

    def gradients_of_ends(self, factors: Tensor, d_begins: Tensor) -> Tensor:
        """[own pieces, H, K, V] the gradients of the states behind this rank's pieces.

        Args:
            factors: [own pieces, H, K, F] M of the pieces.
            d_begins: [begins, H, K, V] gradients of the states that runs of this rank begin with,
                without what its pieces hand on to other runs through their last states.
        """
        plan, layer = self.plan, self.layer
        pending = layer.exchange.gather(
            d_begins.contiguous(), layer.backward_traffic, plan.begins_of_ranks
        )
        factors = self._of_all_pieces(factors, in_backward=True)
        num_pieces = len(plan.source)
        added = d_begins.new_zeros(num_pieces, *d_begins.shape[1:]).requires_grad_()
        with torch.enable_grad():
            begins = self._behind_pieces(factors, added)[plan.begins]
        (d_ends,) = torch.autograd.grad(begins, added, pending.wait())
        return d_ends[plan.own_pieces]

    def _of_all_pieces(self, maps: Tensor, *, in_backward: bool) -> Tensor:
        """[P, ...] of each rank's own pieces [own pieces, ...], in order."""
        plan, layer = self.plan, self.layer
        record = layer.backward_traffic if in_backward else layer.forward_traffic
        pending = layer.exchange.gather(maps.contiguous(), record, plan.pieces_of_ranks)
        return pending.wait()[plan.source]

    def _behind_pieces(self, factors: Tensor, added: Tensor) -> Tensor:
        """[P, H, K, V] the state behind each piece."""
        ends: list[Tensor] = []
        for wave in self.plan.waves:
            state = added[wave.chunks]
            if ends:
                factor, before = factors[wave.chunks], ends[-1][wave.before]
                state = state + (factor * before if factor.shape[-1] == 1 else factor @ before)
            ends.append(state)
        return torch.cat(ends)
