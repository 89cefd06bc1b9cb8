"""Which kind each layer of a HybridModel is, on Megatron's config of the model.

Megatron gives the pattern to the model and not to its config. What plans rows by a config alone
reads it here.
"""

from __future__ import annotations

from typing import Any

from megatron_prefix.layout.hybrid_pattern import layers_of

_PATTERN = "prefix_hybrid_layer_pattern"


def set_hybrid_pattern(config: Any, pattern: str) -> None:
    """Note on Megatron's `TransformerConfig` which layers its HybridModel has."""
    setattr(config, _PATTERN, pattern)


def hybrid_pattern(config: Any) -> str | None:
    """The pattern with its stages; None: the model is a GPTModel."""
    return getattr(config, _PATTERN, None)


def hybrid_layers(config: Any) -> str:
    """[num_layers] the symbol of each layer; "": the model is a GPTModel."""
    return layers_of(hybrid_pattern(config) or "")
