"""Which layers of a model have experts."""

from __future__ import annotations

from typing import Any

from megatron_prefix.attention.layer_kinds import hybrid_layers
from megatron_prefix.layout.hybrid_pattern import EXPERTS


def moe_layers(config: Any) -> tuple[bool, ...]:
    """[num_layers] whether each layer has experts.

    Args:
        config: Megatron's `TransformerConfig`.
    """
    if kinds := hybrid_layers(config):
        return tuple(kind == EXPERTS for kind in kinds)
    frequency = config.moe_layer_freq
    if config.num_moe_experts is None:
        return (False,) * config.num_layers
    if isinstance(frequency, int):
        return tuple(layer % frequency == 0 for layer in range(config.num_layers))
    return tuple(bool(entry) for entry in frequency)
