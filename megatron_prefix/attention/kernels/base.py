"""The contract of an attention kernel: variable-length attention that returns its log-sum-exp.

A call computes n independent rectangles. Rectangle i is queries cu_q[i]:cu_q[i+1] against keys
cu_k[i]:cu_k[i+1]; the rectangles cover q and k, in order, without gaps.

Shapes of this folder: tq, tk are packed tokens; H query heads, Hk key/value heads, H % Hk == 0,
query head h reads key/value head h // (H // Hk); D is the head dimension.

    q, out, dout [tq, H, D]    k, v [tk, Hk, D]    lse [tq, H]    cu_q, cu_k [n+1] int32

All are on one device. q, k and v may be views of which only the last dimension is contiguous, such
as slices of Megatron's fused query-key-value projection; dout is contiguous.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Kernel(Protocol):
    """One implementation of variable-length attention, forward and backward."""

    name: str
    """What `select_kernel` and the configuration call it."""

    automatic: bool
    """Whether it may be chosen without being named."""

    def unsupported(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        *,
        deterministic: bool = False,
    ) -> str | None:
        """Why this kernel cannot run here, as the end of a sentence; None if it can.

        Args:
            deterministic: whether `backward` has to give the same bits every time.
        """
        ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Attention of every rectangle.

        Args:
            max_q, max_k: the longest rectangle's number of queries and keys.
            causal: every rectangle is square, and query j sees keys 0 to j of its rectangle.
                Otherwise it sees all of them.
            scale: factor of q k^T before the softmax.

        A rectangle may have no queries, never no keys.

        Returns:
            out in q's dtype or wider, and lse, the natural logarithm of the sum of exp(scale q k^T)
            over a query's keys, in float32 or wider. Neither shares memory with an input.
        """
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        causal: bool,
        scale: float,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This call's share of dq, dk and dv.

        `out` and `lse` are those of each query over *all* the keys it attends to, in this call and
        in others. With P = exp(scale q k^T - lse), which sums to one over all of them only:

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
