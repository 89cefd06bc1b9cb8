"""Sums over the entries of each sequence, on all context-parallel ranks that hold some of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequences:
    """Which sequence each of E entries belongs to."""

    ids: Tensor
    """[E] int64, from 0 to count - 1."""
    count: int
    """Sequences of this call, S."""
    group: dist.ProcessGroup | None
    """Ranks that the sequences are distributed over; None: all entries are here."""

    def sums(self, *values: Tensor) -> tuple[Tensor, ...]:
        """[S] for each of the [E] values: the sum over a sequence's entries on all ranks.

        Collective over `group`, backward too; one reduction for all values.
        """
        # Accumulating index_put and plain indexing, since the CUDA kernels of index_add and of
        # index_select's backward add in no fixed order.
        own = torch.stack(
            [v.new_zeros(self.count).index_put((self.ids,), v, accumulate=True) for v in values]
        )
        total = own if self.group is None else _SumOverRanks.apply(own, self.group)
        return total.unbind()

    def means(self, values: Tensor, counted: Tensor) -> Tensor:
        """[E] for each entry the mean over the counted entries of its sequence; 0 without any.

        Args:
            values: [E].
            counted: [E] bool.
        """
        counts = counted.to(values.dtype)
        sums, numbers = self.sums(values * counts, counts)
        return (sums / numbers.clamp(min=1))[self.ids]


class _SumOverRanks(torch.autograd.Function):
    """The sum over a group's ranks, each of which goes on to a loss of its own.

    The losses are added up, so the gradient of the sum is that of all ranks together.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The same on every rank."""
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Summed over the ranks' losses."""
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
