"""What Megatron's recurrent layers call of other packages, token by token in the model's dtype.

Megatron's layers themselves stay as they are: the gated delta net on its path in torch, whose own
delta rule rounds to float32; the Mamba mixer on its path without the fused kernel, which has
torch's convolution where causal_conv1d is missing. flash-linear-attention and mamba_ssm run on a
GPU only.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_prefix.megatron.gated_delta_net import GatedDeltaNet, delta_net_layers
from megatron_prefix.megatron.mamba import GatedRMSNorm, build_without_mamba_ssm, mamba_layers


def use_exact_recurrences(config: Any) -> None:
    """Let the recurrent layers that this process builds run by the functions below.

    Args:
        config: Megatron's `TransformerConfig`, of a model that is not built yet.
    """
    if any(delta_net_layers(config)):
        _use_exact_delta_rule(config)
    if any(mamba_layers(config)):
        _use_exact_state_space(config)


def _use_exact_delta_rule(config: Any) -> None:
    # Then the layer takes the torch version of the delta rule, and torch's convolution.
    config.deterministic_mode = True
    for base in GatedDeltaNet.__mro__:
        home = sys.modules[base.__module__]
        if hasattr(home, "torch_chunk_gated_delta_rule"):
            home.torch_chunk_gated_delta_rule = gated_delta_rule
            home.l2norm = l2norm


def l2norm(x: Tensor) -> Tensor:
    """Of each head, with the epsilon of flash-linear-attention's."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **_: Any
) -> tuple[Tensor, None]:
    """The recurrence of arXiv 2412.06464.

    Args:
        query, key: [batch, tokens, heads, K]; value: [batch, tokens, heads, V].
        g: [batch, tokens, heads] logarithms of the decay.
        beta: [batch, tokens, heads]

    Returns:
        [batch, tokens, heads, V], and no state.
    """
    wide = torch.promote_types(value.dtype, torch.float32)
    q, k, v, decay, written = (x.to(wide) for x in (query, key, value, g.exp(), beta))
    state = v.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1])
    outs = []
    for t in range(q.shape[1]):
        state = decay[:, t, :, None, None] * state
        known = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        change = written[:, t, :, None] * (v[:, t] - known)
        state = state + k[:, t, :, :, None] * change[:, :, None]
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return (torch.stack(outs, dim=1) * q.shape[-1] ** -0.5).to(value.dtype), None


def _use_exact_state_space(config: Any) -> None:
    from megatron.core.ssm import mamba_mixer

    build_without_mamba_ssm()
    config.use_mamba_mem_eff_path = False
    mamba_mixer.causal_conv1d_fn = None
    mamba_mixer.mamba_chunk_scan_combined = state_space
    mamba_mixer.ExtendedRMSNorm = _GroupedNorm


def hold_in_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Let Mamba mixers hold in float64 what Megatron holds in float32, where the model does."""
    if dtype == torch.float64:
        for name, parameter in model.named_parameters():
            if name.endswith("mixer.A_log"):
                parameter.data = parameter.data.to(dtype)


class _GroupedNorm(GatedRMSNorm):
    """mamba_ssm's norm as its equation, of one group of channels after the other."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Of x silu(z)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        gated = x.to(wide) * z.to(wide) / (1 + torch.exp(-z.to(wide)))
        groups = [
            group / (group.square().sum(-1, keepdim=True) / self.group_size + self.eps).sqrt()
            for group in gated.split(self.group_size, dim=-1)
        ]
        return (torch.cat(groups, dim=-1) * self.weight).to(x.dtype)


def state_space(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor,
    dt_softplus: bool,
    **_: Any,
) -> Tensor:
    """The recurrence of arXiv 2405.21060.

    Args:
        x: [batch, tokens, heads, P]
        dt: [batch, tokens, heads]
        A: [heads]
        B, C: [batch, tokens, groups, N]
        D: [heads], or [heads, P].
        z: a gate, [batch, tokens, heads, P]; None: what is read is not gated.
        dt_bias: [heads]

    Returns:
        [batch, tokens, heads, P]
    """
    assert dt_softplus
    wide = torch.promote_types(x.dtype, torch.float32)
    values, read, write = x.to(wide), C.to(wide), B.to(wide)
    steps = F.softplus(dt.to(wide) + dt_bias.to(wide))
    group_of_head = torch.arange(x.shape[2]) // (x.shape[2] // B.shape[2])
    state = values.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1])
    outs = []
    for t in range(x.shape[1]):
        step = steps[:, t, :, None, None]
        added = values[:, t, ..., None] * write[:, t, group_of_head, None]
        state = torch.exp(step * A.to(wide)[:, None, None]) * state + step * added
        outs.append((state * read[:, t, group_of_head, None]).sum(-1))
    skip = D.to(wide) if D.dim() == 2 else D.to(wide)[:, None]
    out = torch.stack(outs, dim=1) + skip * values
    if z is not None:
        out = out * F.silu(z.to(wide))
    return out.to(x.dtype)
