"""Which layers of a model have experts."""

from __future__ import annotations

from typing import Any


def moe_layers(config: Any) -> tuple[bool, ...]:
    """[num_layers] whether each layer has experts.

    Args:
        config: Megatron's `TransformerConfig`.
    """
    frequency = config.moe_layer_freq
    if config.num_moe_experts is None:
        return (False,) * config.num_layers
    if isinstance(frequency, int):
        return tuple(layer % frequency == 0 for layer in range(config.num_layers))
    return tuple(bool(entry) for entry in frequency)
