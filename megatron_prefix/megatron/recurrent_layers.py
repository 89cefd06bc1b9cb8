"""Megatron's layers whose state runs along a sequence."""

from __future__ import annotations

from megatron.core.ssm.mamba_layer import MambaLayer

try:
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet
except ImportError:  # since 0.16
    RECURRENT_LAYERS: tuple[type, ...] = (MambaLayer,)
else:
    RECURRENT_LAYERS = (MambaLayer, GatedDeltaNet)
