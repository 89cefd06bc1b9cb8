"""Equal shares of the heads of a recurrent layer, and of what belongs to them.

A rank that exchanges heads computes one share of its tensor-parallel part over the whole row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prefix.attention.context_parallel.heads import to_packed_row
from megatron_prefix.attention.row_recurrence import LayerPaths


@dataclass(frozen=True, kw_only=True)
class HeadShare:
    """One of equal shares of a tensor-parallel rank's heads."""

    index: int = 0
    number: int = 1
    """Of all shares."""

    @classmethod
    def of_paths(cls, paths: LayerPaths) -> HeadShare:
        """The share that this rank computes; all heads where none are exchanged."""
        if paths.whole_row is None:
            return cls()
        return cls(index=paths.exchange.exchange.rank, number=paths.exchange.exchange.size)

    def of(self, x: Tensor) -> Tensor:
        """[n, ...] -> [n / number, ...], of values that lie head after head."""
        return x.unflatten(0, (self.number, -1))[self.index]

    def of_parts(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """The same of parts that lie one behind the other, of so many values each."""
        if self.number == 1:
            return x
        return torch.cat([self.of(part) for part in x.split(list(sizes))])


def rows_of_share(parts: Sequence[Tensor], paths: LayerPaths) -> Tensor:
    """[T, n] of this rank's share of heads, for all tokens of the row. Collective.

    Args:
        parts: each [C, n] of this rank's tokens, head after head.
        paths: of a layer that exchanges heads.
    """
    size = paths.exchange.exchange.size
    of_shares = [x.unflatten(-1, (size, -1)) for x in parts]
    return to_packed_row(torch.cat(of_shares, dim=-1), paths.whole_row, paths.exchange)
