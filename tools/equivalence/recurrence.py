"""What Megatron's gated delta net calls of flash-linear-attention, token by token in the model's
dtype.

Megatron's layer itself stays as it is. Its own torch version of the delta rule rounds to float32,
and flash-linear-attention runs on a GPU only.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from megatron_prefix.megatron.gated_delta_net import GatedDeltaNet, recurrent_layers


def use_exact_delta_rule(config: Any) -> None:
    """Let the gated delta nets that this process builds run by the functions below.

    Args:
        config: Megatron's `TransformerConfig`, of a model that is not built yet.
    """
    if not any(recurrent_layers(config)):
        return
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
