"""What config.json of Qwen3-Next and of Qwen3.5's text models says beyond that of other families.

Gated delta nets between layers of softmax attention, whose heads have a gate of their output. All
norms but one are zero-centred.
"""

from __future__ import annotations

from typing import Any

from megatron_prefix.conversion.architecture import Architecture, LinearAttention
from megatron_prefix.conversion.errors import ConversionError

WITH_DELTA_NETS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
"""Families of this file."""
MROPE_KEYS = ("mrope_section", "mrope_interleaved")
"""Of Qwen3.5's rotary embedding: where images stand. In text all three positions are one."""
MTP_KEYS = {
    "qwen3_next": "num_nextn_predict_layers",
    "qwen3_5_text": "mtp_num_hidden_layers",
    "qwen3_5_moe_text": "mtp_num_hidden_layers",
}
"""Of config.json: the number of layers that predict further tokens (MTP)."""


def read_delta_nets(config: Any, family: str) -> dict[str, Any]:
    """Fields of an `Architecture` with gated delta nets; none for families without any.

    Raises:
        ConversionError: something that Megatron cannot compute, naming the key and its value.
    """
    if family not in WITH_DELTA_NETS:
        return {}
    for layer, kind in enumerate(config.layer_types):
        if kind not in ("linear_attention", "full_attention"):
            raise ConversionError(f"layer_types: layer {layer} is of {kind!r}, which is not known")
    linear_layers = tuple(kind == "linear_attention" for kind in config.layer_types)
    if not any(linear_layers):
        raise ConversionError("layer_types: no layer is of linear_attention")
    if config.attention_bias:
        raise ConversionError("attention_bias: true is not supported with linear_attention")
    return {
        "linear": LinearAttention(
            convolution_width=config.linear_conv_kernel_dim,
            key_heads=config.linear_num_key_heads,
            value_heads=config.linear_num_value_heads,
            key_channels=config.linear_key_head_dim,
            value_channels=config.linear_value_head_dim,
        ),
        "linear_layers": linear_layers,
        "mtp_layers": getattr(config, MTP_KEYS[family], 0) or 0,
    }


def delta_net_values(a: Architecture) -> dict[str, Any]:
    """The gated delta nets, as config.json has them; nothing for families without any."""
    if a.linear is None:
        return {}
    return {
        "linear_conv_kernel_dim": a.linear.convolution_width,
        "linear_num_key_heads": a.linear.key_heads,
        "linear_num_value_heads": a.linear.value_heads,
        "linear_key_head_dim": a.linear.key_channels,
        "linear_value_head_dim": a.linear.value_channels,
        "layer_types": [
            "linear_attention" if linear else "full_attention" for linear in a.linear_layers
        ],
        "attention_bias": False,
        MTP_KEYS[a.family]: a.mtp_layers,
    }


def to_transformer(a: Architecture) -> dict[str, Any]:
    """Fields of Megatron's config; none for families without gated delta nets."""
    if a.linear is None:
        return {}
    return {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [int(linear) for linear in a.linear_layers],
        "linear_conv_kernel_dim": a.linear.convolution_width,
        "linear_num_key_heads": a.linear.key_heads,
        "linear_num_value_heads": a.linear.value_heads,
        "linear_key_head_dim": a.linear.key_channels,
        "linear_value_head_dim": a.linear.value_channels,
        "attention_output_gate": True,
        "layernorm_zero_centered_gamma": True,
    }


_SIZES = {
    "convolution_width": ("linear_conv_kernel_dim", 4),
    "key_heads": ("linear_num_key_heads", 16),
    "value_heads": ("linear_num_value_heads", 32),
    "key_channels": ("linear_key_head_dim", 128),
    "value_channels": ("linear_value_head_dim", 128),
}
"""Fields of `LinearAttention`, Megatron's, and what these are where a config does not say."""
READ = frozenset(
    {
        "experimental_attention_variant",
        "linear_attention_freq",
        "attention_output_gate",
        "layernorm_zero_centered_gamma",
        *(key for key, _ in _SIZES.values()),
    }
)
"""Fields of Megatron's config that `from_transformer` reads."""


def from_transformer(t: dict[str, Any]) -> dict[str, Any]:
    """Fields of an `Architecture` with gated delta nets, of Megatron's config.

    Raises:
        ConversionError: an option that no family has, naming it.
    """
    has_delta_nets = t.get("experimental_attention_variant") is not None
    for key in ("attention_output_gate", "layernorm_zero_centered_gamma"):
        if t.get(key, False) != has_delta_nets:
            raise ConversionError(
                f"model.transformer.{key}: {t.get(key, False)} with "
                "experimental_attention_variant: "
                f"{t.get('experimental_attention_variant')} is nothing that a Hugging Face "
                "config.json of the supported families can say"
            )
    if not has_delta_nets:
        return {}
    every, layers = t["linear_attention_freq"], t["num_layers"]
    linear = tuple(
        (i + 1) % every != 0 if isinstance(every, int) else bool(every[i]) for i in range(layers)
    )
    sizes = {field: t.get(key, default) for field, (key, default) in _SIZES.items()}
    return {"linear": LinearAttention(**sizes), "linear_layers": linear}
