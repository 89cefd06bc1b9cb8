"""The `model` section of a run, written from an `Architecture` and read into one."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_prefix.checkpoints.initial_weights import OF_EXECUTION
from megatron_prefix.config import ModelConfig
from megatron_prefix.conversion.architecture import (
    FAMILIES,
    Architecture,
    LatentAttention,
    SigmoidRouting,
)
from megatron_prefix.conversion.errors import ConversionError
from megatron_prefix.conversion.family import family_of, refuse_mixture, refuse_unless
from megatron_prefix.conversion.hf_qwen3_next import READ as DELTA_NET_FIELDS
from megatron_prefix.conversion.hf_qwen3_next import from_transformer as delta_nets_from_transformer
from megatron_prefix.conversion.hf_qwen3_next import to_transformer as delta_nets_to_transformer


def to_model_config(architecture: Architecture) -> ModelConfig:
    """The `model` section of a run."""
    a = architecture
    transformer: dict[str, Any] = {
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "ffn_hidden_size": a.ffn_hidden_size,
        "gated_linear_unit": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": a.norm_epsilon,
        "add_bias_linear": a.linear_bias,
        "add_qkv_bias": a.qkv_bias,
        "qk_layernorm": a.qk_norm,
    }
    if a.latent is None:
        transformer.update(num_query_groups=a.num_query_groups, kv_channels=a.head_dim)
    else:
        transformer.update(
            multi_latent_attention=True,
            q_lora_rank=a.latent.query_rank,
            kv_lora_rank=a.latent.rank,
            qk_head_dim=a.latent.plain_channels,
            qk_pos_emb_head_dim=a.latent.turned_channels,
            v_head_dim=a.latent.value_channels,
        )
    if a.window is not None:
        # Megatron counts the keys before a query's own.
        transformer["window_size"] = [a.window - 1, 0]
        if not all(a.windowed_layers):
            transformer["window_attn_skip_freq"] = [int(window) for window in a.windowed_layers]
    if a.sinks:
        transformer["softmax_type"] = "learnable"
    if a.gate_limit is not None:
        transformer.update(glu_linear_offset=1.0, activation_func_clamp_value=a.gate_limit)
    if a.num_experts is not None:
        transformer.update(
            num_moe_experts=a.num_experts,
            moe_ffn_hidden_size=a.expert_ffn_hidden_size,
            moe_router_topk=a.experts_per_token,
            # Softmax before the choice leaves the chosen weights as they are; after it, over the
            # chosen alone, it is the same as dividing them by their sum.
            moe_router_pre_softmax=not a.normalized_routing,
        )
        if a.mixed_layers:
            transformer["moe_layer_freq"] = [int(experts) for experts in a.expert_layers]
        if a.shared_expert_ffn_hidden_size is not None:
            transformer["moe_shared_expert_intermediate_size"] = a.shared_expert_ffn_hidden_size
        if a.shared_expert_gate:
            transformer["moe_shared_expert_gate"] = True
        if a.routing is not None:
            transformer.update(_sigmoid_routing(a.routing))
    transformer.update(delta_nets_to_transformer(a))
    if a.computed_mtp_layers:
        transformer["mtp_num_layers"] = a.mtp_layers
    return ModelConfig(
        vocab_size=a.vocab_size,
        max_sequence_length=a.max_length,
        position_embedding_type="rope" if a.yarn is None else "yarn",
        rotary_percent=a.rotary_fraction,
        rotary_base=a.rotary_base,
        rope_scaling=a.llama3_rope_factor is not None,
        rope_scaling_factor=a.llama3_rope_factor or 8.0,
        yarn=a.yarn,
        share_embeddings_and_output_weights=a.tied_embeddings,
        qk_norm_all_heads=a.qk_norm_all_heads,
        activation="silu" if a.gate_limit is None else "quick_gelu",
        transformer=transformer,
    )


def _sigmoid_routing(routing: SigmoidRouting) -> dict[str, Any]:
    options = {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        # The bias stays as it is, unless a run says otherwise.
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": routing.scaling,
        "moe_router_dtype": "fp32",
    }
    if routing.num_groups is not None:
        options["moe_router_num_groups"] = routing.num_groups
        options["moe_router_group_topk"] = routing.chosen_groups
    return options


_READ = {
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "gated_linear_unit",
    "normalization",
    "layernorm_epsilon",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_router_pre_softmax",
    "moe_layer_freq",
    "moe_shared_expert_intermediate_size",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
    "moe_router_topk_scaling_factor",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "window_size",
    "window_attn_skip_freq",
    "softmax_type",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "moe_shared_expert_gate",
    "mtp_num_layers",
    *DELTA_NET_FIELDS,
}


def from_model_config(model: ModelConfig) -> Architecture:
    """Read the `model` section of a run.

    Raises:
        ConversionError: an option that no supported Hugging Face family has.
    """
    t = model.transformer
    if t.get("moe_router_score_function") == "sigmoid":
        # Its bias is a tensor of the family.
        refuse_unless(
            (
                "model.transformer.moe_router_enable_expert_bias",
                t.get("moe_router_enable_expert_bias", False),
                (True,),
            )
        )
    refuse_unless(
        ("model.hybrid_layer_pattern", model.hybrid_layer_pattern, (None,)),
        ("model.position_embedding_type", model.position_embedding_type, ("rope", "yarn")),
        ("model.activation", model.activation, ("silu", "quick_gelu")),
        ("model.transformer.softmax_type", t.get("softmax_type", "vanilla"), _SOFTMAXES),
        ("model.transformer.gated_linear_unit", t.get("gated_linear_unit", False), (True,)),
        ("model.transformer.normalization", t.get("normalization", "RMSNorm"), ("RMSNorm",)),
    )
    for key, value in t.items():
        if key not in _READ | OF_EXECUTION and value != _DEFAULTS.get(key):
            raise ConversionError(
                f"model.transformer.{key}: {value!r} is nothing that a Hugging Face config.json of "
                f"the supported families ({', '.join(FAMILIES)}) can say"
            )
    heads = t["num_attention_heads"]
    hidden = t["hidden_size"]
    ffn = t.get("ffn_hidden_size") or 4 * hidden
    linear_bias = t.get("add_bias_linear", False)
    qkv_bias = linear_bias or t.get("add_qkv_bias", False)
    qk_norm = t.get("qk_layernorm", False)
    latent = _latent_of(t)
    experts = _experts_of(t, ffn)
    windows = _windows_of(t)
    sinks = t.get("softmax_type") == "learnable"
    delta_nets = delta_nets_from_transformer(t)
    family = family_of(
        experts=bool(experts),
        qk_norm=qk_norm,
        qkv_bias_only=qkv_bias and not linear_bias,
        latent=latent is not None,
        sigmoid="routing" in experts,
        window=bool(windows),
        sinks=sinks,
        qk_norm_all_heads=model.qk_norm_all_heads,
        shared_expert_gate=experts.get("shared_expert_gate", False),
        delta_nets=bool(delta_nets),
    )
    if family in ("mixtral", "gpt_oss") and experts:
        ffn = experts["expert_ffn_hidden_size"]  # one size, and no layer without experts
    head_dim = t.get("kv_channels") or hidden // heads
    architecture = Architecture(
        family=family,
        num_layers=t["num_layers"],
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=t.get("num_query_groups") or heads,
        # As transformers names it where queries and keys are compressed.
        head_dim=head_dim if latent is None else latent.turned_channels,
        ffn_hidden_size=ffn,
        vocab_size=model.vocab_size,
        max_length=model.max_sequence_length,
        norm_epsilon=t.get("layernorm_epsilon", _DEFAULTS["layernorm_epsilon"]),
        tied_embeddings=model.share_embeddings_and_output_weights,
        qkv_bias=qkv_bias,
        linear_bias=linear_bias,
        qk_norm=qk_norm,
        qk_norm_all_heads=model.qk_norm_all_heads,
        rotary_base=model.rotary_base,
        rotary_fraction=model.rotary_percent,
        llama3_rope_factor=model.rope_scaling_factor if model.rope_scaling else None,
        yarn=model.yarn,
        latent=latent,
        sinks=sinks,
        gate_limit=_gate_limit_of(model),
        mtp_layers=t.get("mtp_num_layers") or 0,
        mtp_computed=bool(t.get("mtp_num_layers")),
        **windows,
        **experts,
        **delta_nets,
    )
    refuse_mixture(architecture)
    return architecture


_SOFTMAXES = ("vanilla", "learnable")
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(MLATransformerConfig)}


def _latent_of(t: dict[str, Any]) -> LatentAttention | None:
    if not t.get("multi_latent_attention", False):
        return None
    sizes = {
        "query_rank": "q_lora_rank",
        "rank": "kv_lora_rank",
        "plain_channels": "qk_head_dim",
        "turned_channels": "qk_pos_emb_head_dim",
        "value_channels": "v_head_dim",
    }
    return LatentAttention(**{ours: t.get(key, _DEFAULTS[key]) for ours, key in sizes.items()})


def _gate_limit_of(model: ModelConfig) -> float | None:
    """What the MLP's halves are clamped at, where it is gpt-oss'."""
    t = model.transformer
    limit, offset = t.get("activation_func_clamp_value"), t.get("glu_linear_offset", 0.0)
    if model.activation == "silu" and limit is None and offset == 0.0:
        return None
    if model.activation == "silu" or limit is None or offset != 1.0:
        raise ConversionError(
            f"model.activation: {model.activation!r} with activation_func_clamp_value: {limit} and "
            f"glu_linear_offset: {offset} is no supported Hugging Face family; silu has neither, "
            "and quick_gelu (gpt-oss) has a clamp value and an offset of 1.0"
        )
    return limit


def _windows_of(t: dict[str, Any]) -> dict[str, Any]:
    """Fields of an `Architecture` with sliding windows."""
    size = t.get("window_size")
    if not size:
        return {}
    layers, skip = t["num_layers"], t.get("window_attn_skip_freq")
    if isinstance(skip, int):
        windowed = tuple(layer % skip != 0 for layer in range(1, layers + 1))
    else:
        windowed = tuple(map(bool, skip or [1] * layers))
    return {"window": size[0] + 1, "windowed_layers": windowed} if any(windowed) else {}


def _experts_of(t: dict[str, Any], ffn: int) -> dict[str, Any]:
    """Fields of an `Architecture` with experts."""
    if t.get("num_moe_experts") is None:
        return {}
    frequency = t.get("moe_layer_freq", 1)
    found: dict[str, Any] = {
        "num_experts": t["num_moe_experts"],
        "expert_ffn_hidden_size": t.get("moe_ffn_hidden_size") or ffn,
        "experts_per_token": t.get("moe_router_topk", 2),
        "normalized_routing": not t.get("moe_router_pre_softmax", False),
        "expert_layers": tuple(
            (i % frequency == 0) if isinstance(frequency, int) else bool(frequency[i])
            for i in range(t["num_layers"])
        ),
        "shared_expert_ffn_hidden_size": t.get("moe_shared_expert_intermediate_size"),
        "shared_expert_gate": t.get("moe_shared_expert_gate", False),
    }
    if t.get("moe_router_score_function", "softmax") == "sigmoid":
        # How a softmax would be taken is nothing to sigmoid scores.
        found["normalized_routing"] = True
        found["routing"] = SigmoidRouting(
            scaling=t.get("moe_router_topk_scaling_factor") or 1.0,
            num_groups=t.get("moe_router_num_groups"),
            chosen_groups=t.get("moe_router_group_topk"),
        )
    return found
