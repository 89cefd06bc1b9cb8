"""The contract of an attention kernel: variable-length attention that returns its log-sum-exp.

A call computes n independent `Rectangles`. Rectangle i is queries cu_q[i]:cu_q[i+1] against keys
cu_k[i]:cu_k[i+1]; the rectangles cover q and k, in order, without gaps. One may have no queries,
never no keys.

Shapes of this folder: tq, tk are packed tokens; H query heads, Hk key/value heads, H % Hk == 0,
query head h reads key/value head h // (H // Hk); D is the head dimension, Dv that of values.

    q [tq, H, D]    k [tk, Hk, D]    v [tk, Hk, Dv]    out, dout [tq, H, Dv]
    lse [tq, H]     cu_q, cu_k [n+1] int32

All are on one device. q, k and v may be views of which only the last dimension is contiguous, such
as slices of Megatron's fused query-key-value projection; dout is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_prefix.layout import Rectangles

__all__ = ["CallOptions", "Kernel", "KernelInputs", "MergedAttention", "Rectangles"]


@dataclass(frozen=True, kw_only=True, eq=False)
class MergedAttention:
    """What a backward reads of its queries. `out` and `lse` are over *all* keys that a query
    attends to, in this call and in other calls."""

    dout: Tensor
    """[tq, H, Dv], contiguous"""
    q: Tensor
    """[tq, H, D]"""
    out: Tensor
    """[tq, H, Dv]"""
    lse: Tensor
    """[tq, H]"""

    def __getitem__(self, rows: slice | Tensor) -> MergedAttention:
        """The same of some queries only."""
        return MergedAttention(
            dout=self.dout[rows], q=self.q[rows], out=self.out[rows], lse=self.lse[rows]
        )


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """How a call computes its rectangles."""

    scale: float
    """Factor of q k^T before the softmax."""
    deterministic: bool = False
    """The same inputs give the same gradients, to the bit."""


@dataclass(frozen=True, kw_only=True)
class KernelInputs:
    """What a kernel is asked to compute."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    deterministic: bool = False
    """Whether `Kernel.backward` has to give the same bits every time."""
    windows: bool = False
    """Whether some calls have a sliding window, see `Rectangles.window`."""


OutAndLse = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]
"""dq, dk and dv."""


class Kernel(Protocol):
    """One implementation of variable-length attention, forward and backward."""

    name: str
    """What `select_kernel` and the configuration call it."""

    automatic: bool
    """Whether it may be chosen without being named."""

    windows: bool
    """Whether it computes rectangles with a sliding window; the registry asks it for no others."""

    value_sizes: bool
    """Whether it takes Dv < D; others are called with values that are filled up with zeros."""

    def unsupported(self, inputs: KernelInputs) -> str | None:
        """Why this kernel cannot run here, as the end of a sentence; None if it can."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, on: Rectangles, options: CallOptions
    ) -> OutAndLse:
        """Attention of every rectangle.

        Args:
            on: the rectangles.
            options: `deterministic` says nothing here.

        Returns:
            out in q's dtype or wider, and lse, the natural logarithm of the sum of exp(scale q k^T)
            over a query's keys, in float32 or wider. Neither shares memory with an input.
        """
        ...

    def backward(
        self, merged: MergedAttention, k: Tensor, v: Tensor, on: Rectangles, options: CallOptions
    ) -> Gradients:
        """This call's share of dq, dk and dv.

        With P = exp(scale q k^T - lse), which sums to one over all keys of a query only:

            dv = P^T dout              dS = P * (dout v^T - rowsum(dout * out))
            dq = scale dS k            dk = scale dS^T q

        (FlashAttention-2, arXiv:2307.08691, algorithm 2, which never uses that P is normalised
        within the call.)

        Returns:
            dq, dk, dv shaped like q, k, v, in their dtype or wider; dk and dv are zero where a
            rectangle has no queries. With `deterministic` the same inputs give the same bits. None
            shares memory with an input, since the caller adds into them.
        """
        ...
