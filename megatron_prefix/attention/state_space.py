"""The selective state space of Mamba-2 (arXiv 2405.21060) over a packed row with shared prefixes.

For each token, with a state S [K, V] of a head that runs along its path:

    S = exp(g) S + b (dt x)^T;    out = S^T c

It is computed in torch, in chunks as the delta rule of torch is, and exact in float64. What a token
writes does not depend on the state, so what a part of a path makes of it is a number and what is
added.

Shapes: T tokens, H heads, G groups of heads that share b and c, K the size of the state and V that
of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prefix.attention.chunks import Chunks, decays, in_chunks
from megatron_prefix.layout import Recurrence


class StateSpaceRule:
    """`SteppedRule` for any device and dtype."""

    def of(
        self, c: Tensor, b: Tensor, x: Tensor, g: Tensor, dt: Tensor, row: Recurrence[Tensor]
    ) -> Chunks:
        """The state space of a row.

        Args:
            c, b: [T, G, K] how tokens read the state, and how they write; x: [T, H, V].
            g: [T, H] logarithms of the decay, at most 0; dt: [T, H] steps of time; both in float32
                or wider.
            row: the row's paths, or those of this rank's part of it.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        c, b, x, g, dt = (in_chunks(y.to(wide), row.chunks) for y in (c, b, x, g, dt))
        heads = x.shape[1] // c.shape[1]
        decay = decays(g)
        scores = (c @ b.mT).repeat_interleave(heads, dim=1) * decay
        c, b = (y.repeat_interleave(heads, dim=1) for y in (c, b))
        g = g.cumsum(-1)
        return Chunks(
            new=x * dt[..., None],
            reads=None,
            scores=scores,
            queries=c * g.exp()[..., None],
            keys=b * decay[..., -1, :, None],
            kept=g[..., -1, None, None].exp(),
        )

    def step(self, c: Tensor, b: Tensor, x: Tensor, g: Tensor, dt: Tensor, state: Tensor) -> Tensor:
        """See `SteppedRule.step`."""
        heads = x.shape[1] // c.shape[1]
        c, b = (y.to(state.dtype).repeat_interleave(heads, dim=1) for y in (c, b))
        new = x.to(state.dtype) * dt[..., None]
        state.mul_(g.exp()[..., None, None]).add_(b[..., None] * new[..., None, :])
        return (c[..., None, :] @ state)[..., 0, :].to(x.dtype)
