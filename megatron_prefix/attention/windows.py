"""Which layers of a model have a sliding window: `window_size` and `window_attn_skip_freq`."""

from __future__ import annotations

from typing import Any

from megatron_prefix.attention.layer_kinds import hybrid_layers
from megatron_prefix.layout.hybrid_pattern import ATTENTION


def model_window(config: Any) -> int | None:
    """Keys before its own that a query sees in the model's layers with a window; None: no layer.

    Args:
        config: Megatron's `TransformerConfig`; its `window_size` is None, or (keys before, keys
            behind), of which only causal windows, (n, 0), get here.
    """
    size = config.window_size
    return int(size[0]) if size else None


def layer_window(config: Any, layer_number: int) -> int | None:
    """The same of one layer, which may be one without a window.

    Args:
        config: its `window_attn_skip_freq` is None (every layer has the window), n (every nth has
            none), or a list of one value for each layer, true for a window.
        layer_number: of the layer in the whole model, from 1.
    """
    window, skip = model_window(config), getattr(config, "window_attn_skip_freq", None)
    if window is None or skip is None:
        return window
    has_window = skip[layer_number - 1] if isinstance(skip, list) else layer_number % skip != 0
    return window if has_window else None


def windowed_layers(config: Any) -> tuple[bool, ...]:
    """[num_layers] whether each layer of the model has a sliding window."""
    layers = range(1, config.num_layers + 1)
    windowed = tuple(layer_window(config, number) is not None for number in layers)
    if kinds := hybrid_layers(config):
        return tuple(w and k == ATTENTION for w, k in zip(windowed, kinds, strict=True))
    return windowed
