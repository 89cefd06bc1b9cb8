"""Megatron's layers whose state runs along a sequence."""

from __future__ import annotations

from megatron.core.ssm.mamba_layer import MambaLayer

from megatron_prefix.megatron.gated_delta_net import GatedDeltaNet

RECURRENT_LAYERS: tuple[type, ...] = (
    (MambaLayer,) if GatedDeltaNet is None else (MambaLayer, GatedDeltaNet)
)
