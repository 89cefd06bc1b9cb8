"""Megatron's Mamba mixer as its equations, one token after the other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_prefix.megatron.mamba import MambaMixer, widen

if MambaMixer is not None:

    class TokenByToken(MambaMixer):
        """Megatron's layer, whose own forward needs a GPU."""

        def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            x = self.in_proj(hidden_states)[0][:, 0]
            inner, groups, states = self.d_inner_local_tp, self.ngroups_local_tp, self.d_state
            gate, xbc, dt = x.split([inner, inner + 2 * groups * states, self.nheads_local_tp], -1)
            own_module = hasattr(self, "conv1d")
            weight = self.conv1d.weight if own_module else self.conv1d_weight
            bias = self.conv1d.bias if own_module else self.conv1d_bias
            padded = F.pad(xbc.T[None], (self.d_conv - 1, 0))
            xbc = F.silu(F.conv1d(padded, weight, bias, groups=xbc.shape[1])[0].T)
            x, b, c = xbc.split([inner, groups * states, groups * states], dim=-1)
            x = x.unflatten(-1, (-1, self.headdim))
            heads = x.shape[1] // groups
            b, c = (
                y.unflatten(-1, (groups, -1)).repeat_interleave(heads, dim=1).unflatten(1, (-1, 1))
                for y in (b, c)
            )
            dt = F.softplus(dt + self.dt_bias)
            decay = (-self.A_log.exp() * dt).exp()
            skip = self.D.unflatten(0, (len(self.A_log), -1))
            state, outs = torch.zeros(len(self.A_log), self.headdim, states), []
            for t in range(len(x)):
                state = decay[t][:, None, None] * state
                state = state + dt[t][:, None, None] * x[t][:, :, None] * b[t]
                outs.append((state * c[t]).sum(-1) + skip * x[t])
            out = torch.stack(outs).flatten(1) * F.silu(gate)
            if self.rmsnorm:
                of_groups = out.unflatten(-1, (groups, -1))
                mean = of_groups.square().mean(-1, keepdim=True)
                out = (of_groups / (mean + 1e-5).sqrt()).flatten(1) * self.norm.weight
            return self.out_proj(out[:, None])


def run_token_by_token(model: nn.Module) -> None:
    """Let the Mamba mixers of an unmodified model run so, in the model's dtype."""
    for module in model.modules():
        if MambaMixer is not None and type(module) is MambaMixer:
            module.__class__ = TokenByToken
            widen(module)
