"""The family that a `model` section is of, and mixtures of options that no family has."""

from __future__ import annotations

from typing import Any

from megatron_prefix.conversion.architecture import FAMILIES, Architecture
from megatron_prefix.conversion.errors import ConversionError
from megatron_prefix.conversion.mtp_tensors import refuse_mtp

_SIGMOID = "multi_latent_attention and moe_router_score_function: sigmoid"
_MADE_BY = {
    "deepseek_v3": _SIGMOID,
    "glm4_moe": _SIGMOID,
    "gpt_oss": "softmax_type: learnable and activation: quick_gelu",
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_text"), "experimental_attention_variant: gated_delta_net"
    ),
    "minimax_m2": "qk_norm_all_heads: true and its experts",
    "qwen2_moe": "moe_shared_expert_gate: true and its experts",
}
"""What makes a model one of a family that is known by its options."""


def family_of(
    *,
    experts: bool,
    qk_norm: bool,
    qkv_bias_only: bool,
    latent: bool,
    sigmoid: bool,
    window: bool,
    sinks: bool,
    qk_norm_all_heads: bool,
    shared_expert_gate: bool,
    delta_nets: bool,
) -> str:
    """Hugging Face's model_type of a model that has these."""
    if sinks:
        return "gpt_oss"
    if qk_norm_all_heads:
        return "minimax_m2"
    if latent:
        return "deepseek_v3"
    if sigmoid:
        return "glm4_moe"
    if delta_nets:
        return "qwen3_next" if experts else "qwen3_5_text"
    if shared_expert_gate:
        return "qwen2_moe"
    if experts:
        return "qwen3_moe" if qk_norm else "mixtral"
    if qk_norm:
        return "qwen3"
    if qkv_bias_only:
        return "qwen2"
    # Without a window Mistral's models are Llama's.
    return "mistral" if window else "llama"


def refuse_mixture(a: Architecture) -> None:
    """Combinations of options that no family has."""
    refuse_mtp(a)
    partly_turned = a.linear is not None or a.family in ("glm4_moe", "minimax_m2")
    if a.rotary_fraction != 1.0 and not partly_turned:
        refuse_unless(("model.rotary_percent", a.rotary_fraction, (1.0,)))
    if (a.gate_limit is not None) != (a.family == "gpt_oss"):
        raise ConversionError(
            "model.transformer.softmax_type: learnable and model.activation: quick_gelu are "
            "gpt-oss', which has both"
        )
    if a.family == "gpt_oss":
        _refuse_mixture_of_gpt_oss(a)
        return
    if a.latent is not None:
        _refuse_mixture_with_latent(a)
        return
    if a.linear is not None:
        _refuse_mixture_with_delta_nets(a)
        return
    if a.family == "glm4_moe":
        _refuse_mixture_of_sigmoid_experts(a)
        return
    if a.family == "minimax_m2":
        _refuse_mixture_of_minimax(a)
        return
    if a.family == "qwen2_moe":
        _refuse_mixture_of_qwen2_experts(a)
        return
    if a.family == "mistral" and a.linear_bias:
        raise ConversionError(
            "model.transformer.add_bias_linear: true with window_size is no supported Hugging Face "
            f"family ({', '.join(FAMILIES)})"
        )
    if a.qkv_bias and (a.qk_norm or a.num_experts is not None):
        raise ConversionError(
            "model.transformer.add_qkv_bias: true with qk_layernorm or experts is no supported "
            f"Hugging Face family ({', '.join(FAMILIES)})"
        )
    if a.family == "mixtral" and (a.mixed_layers or not a.normalized_routing):
        raise ConversionError(
            "model.transformer: experts without qk_layernorm are Mixtral's, which has no "
            "moe_layer_freq other than 1 and no moe_router_pre_softmax: true"
        )
    if a.shared_expert_ffn_hidden_size is not None:
        raise ConversionError(
            "model.transformer.moe_shared_expert_intermediate_size without "
            "moe_router_score_function: sigmoid is no supported Hugging Face family "
            f"({', '.join(FAMILIES)})"
        )


def _refuse_mixture_of_gpt_oss(a: Architecture) -> None:
    """What gpt-oss has not."""
    _refuse_if(a, a.num_experts is None or a.mixed_layers, "a layer without experts")
    _refuse_if(a, not a.linear_bias, "add_bias_linear: false")
    _refuse_if(a, a.qk_norm, "qk_layernorm: true")
    _refuse_if(a, a.latent is not None, "multi_latent_attention: true")
    _refuse_if(a, a.routing is not None, "moe_router_score_function: sigmoid")
    _refuse_if(a, not a.normalized_routing, "moe_router_pre_softmax: true")
    _refuse_if(a, a.shared_expert_ffn_hidden_size is not None, "a shared expert")


def _refuse_mixture_of_minimax(a: Architecture) -> None:
    """What MiniMax-M2 has not."""
    _refuse_if(a, a.num_experts is None or a.mixed_layers, "a layer without experts")
    _refuse_if(a, a.routing is None, "moe_router_score_function other than sigmoid")
    if a.routing is not None:
        _refuse_if(a, a.routing.num_groups is not None, "moe_router_num_groups")
        _refuse_if(a, a.routing.scaling != 1.0, "moe_router_topk_scaling_factor")
    _refuse_if(a, a.qkv_bias, "add_qkv_bias or add_bias_linear: true")
    _refuse_if(a, a.window is not None, "window_size")
    _refuse_if(a, a.shared_expert_ffn_hidden_size is not None, "a shared expert")
    scaled = a.yarn is not None or a.llama3_rope_factor is not None
    _refuse_if(a, scaled, "scaled rotary frequencies")


def _refuse_mixture_of_qwen2_experts(a: Architecture) -> None:
    """What Qwen2's models with experts have not."""
    _refuse_if(a, a.shared_expert_ffn_hidden_size is None, "no shared expert")
    _refuse_if(a, a.linear_bias, "add_bias_linear: true")
    _refuse_if(a, a.qk_norm, "qk_layernorm: true")
    _refuse_if(a, a.window is not None, "window_size")


def _refuse_mixture_with_delta_nets(a: Architecture) -> None:
    """What Qwen3-Next and Qwen3.5 have not."""
    _refuse_if(a, not a.qk_norm, "qk_layernorm: false")
    _refuse_if(a, a.qkv_bias, "add_qkv_bias or add_bias_linear: true")
    _refuse_if(a, a.window is not None, "window_size")
    _refuse_if(a, a.routing is not None, "moe_router_score_function: sigmoid")
    _refuse_if(a, bool(a.expert_layers) and not a.shared_expert_gate, "no gated shared expert")
    _refuse_if(
        a, a.yarn is not None or a.llama3_rope_factor is not None, "scaled rotary frequencies"
    )


def _refuse_mixture_with_latent(a: Architecture) -> None:
    """What DeepSeek-V3 has not."""
    _refuse_if(a, not a.qk_norm, "qk_layernorm: false")
    _refuse_if(a, a.qkv_bias, "add_qkv_bias or add_bias_linear: true")
    _refuse_if(a, a.num_query_groups != a.num_attention_heads, "num_query_groups")
    _refuse_if(a, a.routing is None, "moe_router_score_function other than sigmoid")
    _refuse_mixture_of_sigmoid_experts(a)


def _refuse_mixture_of_sigmoid_experts(a: Architecture) -> None:
    """What neither DeepSeek-V3 nor GLM-4.5 has."""
    _refuse_if(a, a.window is not None, "window_size")
    layers = list(a.expert_layers)
    _refuse_if(a, a.linear_bias, "add_bias_linear: true")
    _refuse_if(a, layers != sorted(layers), "moe_layer_freq with a dense layer after experts")
    shared, size = a.shared_expert_ffn_hidden_size, a.expert_ffn_hidden_size
    _refuse_if(
        a,
        not shared or not size or shared % size != 0,
        f"moe_shared_expert_intermediate_size: {shared} that is no multiple of "
        f"moe_ffn_hidden_size: {size}",
    )
    scaled = a.yarn is not None or a.llama3_rope_factor is not None
    _refuse_if(a, a.latent is None and scaled, "scaled rotary frequencies")


def _refuse_if(a: Architecture, found: bool, what: str) -> None:
    if found:
        raise ConversionError(
            f"model: {what} is nothing that a config.json of {a.family} can say, the family that "
            f"{_MADE_BY[a.family]} make this model"
        )


def refuse_unless(*options: tuple[str, Any, tuple[Any, ...]]) -> None:
    """Refuse options whose value is none of those that are accepted: (name, value, accepted)."""
    for name, value, accepted in options:
        if value not in accepted:
            raise ConversionError(
                f"{name}: {value!r} is nothing that a Hugging Face config.json of the supported "
                f"families ({', '.join(FAMILIES)}) can say; they have "
                f"{' or '.join(map(repr, accepted))}"
            )
