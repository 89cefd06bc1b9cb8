"""Which kind each layer of a HybridModel is, on Megatron's config of the model.

Megatron gives the pattern to the model and not to its config. What plans rows by a config alone
reads it here.
"""

from __future__ import annotations

from typing import Any

from megatron_prefix.layout.hybrid_pattern import GATED_DELTA_NET, MAMBA, layers_of

_PATTERN = "prefix_hybrid_layer_pattern"

MAMBA_CONVOLUTION_WIDTH = 4
"""Inputs that the convolution of Megatron's Mamba layers reads; no option of a config says it."""


def set_hybrid_pattern(config: Any, pattern: str) -> None:
    """Note on Megatron's `TransformerConfig` which layers its HybridModel has."""
    setattr(config, _PATTERN, pattern)


def hybrid_pattern(config: Any) -> str | None:
    """The pattern with its stages; None: the model is a GPTModel."""
    return getattr(config, _PATTERN, None)


def hybrid_layers(config: Any) -> str:
    """[num_layers] the symbol of each layer; "": the model is a GPTModel."""
    return layers_of(hybrid_pattern(config) or "")


def has_delta_nets(config: Any) -> bool:
    """Whether a model with Megatron's config `config` has gated delta nets."""
    if kinds := hybrid_layers(config):
        return GATED_DELTA_NET in kinds
    return getattr(config, "experimental_attention_variant", None) == "gated_delta_net"


def convolution_widths(config: Any) -> list[int]:
    """Inputs that the convolution reads, the token's own included, of each kind of recurrent layers
    that a model with Megatron's config `config` has."""
    widths = [config.linear_conv_kernel_dim] if has_delta_nets(config) else []
    return widths + [MAMBA_CONVOLUTION_WIDTH] * (MAMBA in hybrid_layers(config))
