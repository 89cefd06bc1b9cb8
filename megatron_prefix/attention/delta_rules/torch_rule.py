"""The gated delta rule in torch, exact in float64: chunks of a row, wave after wave."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prefix.attention.chunks import Chunks, decays, in_chunks
from megatron_prefix.attention.delta_rules.base import RuleInputs
from megatron_prefix.layout import Recurrence


class TorchRule:
    """`DeltaRule` for any device and dtype."""

    name = "torch"

    def unsupported(self, inputs: RuleInputs) -> str | None:
        """See `DeltaRule.unsupported`."""
        return None

    def of(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, row: Recurrence[Tensor]
    ) -> Chunks:
        """See `DeltaRule.of`."""
        wide = torch.promote_types(v.dtype, torch.float32)
        q, k, values, g, beta = (in_chunks(x.to(wide), row.chunks) for x in (q, k, v, g, beta))
        q = q * q.shape[-1] ** -0.5
        decay = decays(g)
        g = g.cumsum(-1)
        written = k * beta[..., None]
        # What a chunk's tokens write depends on what those before them in it have written.
        among = (written @ k.mT * decay).tril(-1)
        among = among + torch.eye(g.shape[-1], dtype=wide, device=g.device)
        solved = torch.linalg.solve_triangular(
            among,
            torch.cat((values * beta[..., None], written * g.exp()[..., None]), dim=-1),
            upper=False,
            unitriangular=True,
        )
        new, reads = solved.split([values.shape[-1], k.shape[-1]], dim=-1)
        return Chunks(
            new=new,
            reads=reads,
            scores=q @ k.mT * decay,
            queries=q * g.exp()[..., None],
            keys=k * decay[..., -1, :, None],
            kept=g[..., -1, None, None].exp(),
        )

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
    ) -> Tensor:
        """See `Rule.step`."""
        wide = state.dtype
        q, k, values, g, beta = (x.to(wide) for x in (q, k, v, g, beta))
        state.mul_(g.exp()[..., None, None])
        known = (k[..., None, :] @ state)[..., 0, :]
        change = beta[..., None] * (values - known)
        state.flatten(0, 1).baddbmm_(k.flatten(0, 1)[:, :, None], change.flatten(0, 1)[:, None])
        return ((q[..., None, :] @ state)[..., 0, :] * q.shape[-1] ** -0.5).to(v.dtype)
