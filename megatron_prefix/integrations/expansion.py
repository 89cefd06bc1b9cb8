"""Rows that several rows of a framework share, given to each of them; their gradients added up.

A plain `index_select` would do, but for its gradient: on a GPU it adds up in the tensor's own dtype
and in any order. Here sums are in float32 or wider, and in one order.

Legend: N rows that were computed, T rows that are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_prefix.device_copy import record_to_device
from megatron_prefix.layout.stages import Array

_SUMMED_AT_ONCE = 256
"""Rows whose gradients are added up in one buffer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sums(Generic[Array]):
    """Some rows that have several takers, those with most of them first."""

    rows: Array
    """[n] int64, of the N."""
    takers: tuple[Array, ...]
    """First [n] int64 takers, of the T; then the second ones of those that have two, and so on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Expansion(Generic[Array]):
    """Which of N rows each of T rows is."""

    num_rows: int
    """N"""
    rows: Array
    """[T] int64"""
    single_rows: Array
    """int64: those of the N that have one taker,"""
    single_takers: Array
    """and that taker."""
    sums: tuple[_Sums[Array], ...]

    @classmethod
    def of(
        cls, rows: np.ndarray, num_rows: int, *, ignored: np.ndarray | None = None
    ) -> Expansion[np.ndarray]:
        """Plan an expansion on the host.

        Args:
            rows: [T] int64.
            num_rows: N.
            ignored: [T] bool, rows whose gradient is left out; None: no row.
        """
        takers = np.arange(len(rows)) if ignored is None else np.flatnonzero(~ignored)
        takers = takers[np.argsort(rows[takers], kind="stable")]
        taken, first, counts = np.unique(rows[takers], return_index=True, return_counts=True)
        single = counts == 1
        several = np.flatnonzero(~single)
        several = several[np.argsort(-counts[several], kind="stable")]
        sums = []
        for begin in range(0, len(several), _SUMMED_AT_ONCE):
            part = several[begin : begin + _SUMMED_AT_ONCE]
            rounds = [
                takers[first[part][counts[part] > k] + k] for k in range(counts[part[0]].item())
            ]
            sums.append(_Sums(rows=taken[part], takers=tuple(rounds)))
        return Expansion(
            num_rows=num_rows,
            rows=rows,
            single_rows=taken[single],
            single_takers=takers[first[single]],
            sums=tuple(sums),
        )

    def to(self, device: torch.device) -> Expansion[Tensor]:
        """The same with tensors on a device, of a plan on the host."""
        return record_to_device(self, device)


def expand(values: Tensor, expansion: Expansion[Tensor]) -> Tensor:
    """[N, ...] -> [T, ...], a tensor of its own that may be written to.

    Its gradient is that of the rows, added up over their takers.
    """
    return _Expand.apply(values, expansion)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, expansion: Expansion[Tensor]) -> Tensor:
        assert values.size(0) == expansion.num_rows
        ctx.expansion = expansion
        return values.index_select(0, expansion.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        expansion: Expansion[Tensor] = ctx.expansion
        found = grad.new_zeros((expansion.num_rows, *grad.shape[1:]))
        found.index_copy_(0, expansion.single_rows, grad.index_select(0, expansion.single_takers))
        wide = torch.promote_types(grad.dtype, torch.float32)
        for part in expansion.sums:
            first, *others = part.takers
            total = grad.index_select(0, first).to(wide)
            for takers in others:
                total[: len(takers)] += grad.index_select(0, takers)
            found.index_copy_(0, part.rows, total.to(grad.dtype))
        return found, None
