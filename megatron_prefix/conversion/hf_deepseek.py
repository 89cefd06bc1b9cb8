"""What config.json of DeepSeek-V3 and GLM-4.5 says beyond that of other families.

Of DeepSeek-V3, Moonlight and Kimi K2, and of GLM-4.5 to 4.7: multi-latent attention, routers that
choose by sigmoid scores and a bias, and shared experts.
"""

from __future__ import annotations

from typing import Any

from megatron_prefix.config import YarnConfig
from megatron_prefix.conversion.architecture import (
    Architecture,
    LatentAttention,
    SigmoidRouting,
)
from megatron_prefix.conversion.errors import ConversionError


def read_latent(config: Any) -> LatentAttention:
    """The sizes of multi-latent attention, of transformers' config.

    Raises:
        ConversionError: something that Megatron cannot compute, naming the key and its value.
    """
    if not config.rope_interleave:
        raise ConversionError(
            f"rope_interleave: {config.rope_interleave} is not supported; Megatron's multi-latent "
            "attention turns pairs of neighbouring dimensions"
        )
    if config.num_key_value_heads != config.num_attention_heads:
        raise ConversionError(
            f"num_key_value_heads: {config.num_key_value_heads} is not supported with "
            f"num_attention_heads: {config.num_attention_heads}; multi-latent attention has as "
            "many of both"
        )
    if config.attention_bias:
        raise ConversionError(
            "attention_bias: true is not supported; Megatron's multi-latent attention has no "
            "biases of the compressing layers"
        )
    return LatentAttention(
        query_rank=config.q_lora_rank,
        rank=config.kv_lora_rank,
        plain_channels=config.qk_nope_head_dim,
        turned_channels=config.qk_rope_head_dim,
        value_channels=config.v_head_dim,
    )


def read_sigmoid_experts(config: Any) -> dict[str, Any]:
    """Fields of an `Architecture` whose routers choose by sigmoid scores.

    Raises:
        ConversionError: Megatron's routers cannot choose so, naming the key and its value.
    """
    return {
        "num_experts": config.n_routed_experts,
        "expert_ffn_hidden_size": config.moe_intermediate_size,
        "experts_per_token": config.num_experts_per_tok,
        "expert_layers": tuple(
            layer >= config.first_k_dense_replace for layer in range(config.num_hidden_layers)
        ),
        "shared_expert_ffn_hidden_size": config.moe_intermediate_size * config.n_shared_experts,
        "routing": _routing(config),
        "mtp_layers": getattr(config, "num_nextn_predict_layers", 0) or 0,
    }


def _routing(config: Any) -> SigmoidRouting:
    chosen = config.num_experts_per_tok
    for name, of in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if getattr(config, name, of) != of:
            raise ConversionError(
                f"{name}: {getattr(config, name)!r} is not supported; transformers and this "
                f"conversion have {of}"
            )
    # Megatron divides the chosen weights by their sum, unless there is one.
    if bool(config.norm_topk_prob) != (chosen > 1):
        raise ConversionError(
            f"norm_topk_prob: {config.norm_topk_prob} with num_experts_per_tok: {chosen} is not "
            "supported; Megatron's routers with sigmoid scores divide several chosen weights by "
            "their sum, and leave a single one as it is"
        )
    scaling = float(config.routed_scaling_factor)
    if config.topk_group == config.n_group:
        return SigmoidRouting(scaling=scaling)
    if chosen // config.topk_group != 2:
        raise ConversionError(
            f"topk_group: {config.topk_group} with num_experts_per_tok: {chosen} is not supported; "
            "transformers ranks a group by its two best experts, Megatron by its "
            f"{chosen // config.topk_group} best (num_experts_per_tok / topk_group)"
        )
    return SigmoidRouting(
        scaling=scaling, num_groups=config.n_group, chosen_groups=config.topk_group
    )


def read_latent_yarn(rope: dict[str, Any]) -> dict[str, float]:
    """YaRN's attention factors, which multi-latent attention also multiplies its scores by.

    Raises:
        ConversionError: transformers and Megatron read them in different ways.
    """
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if all_dim and not mscale:
        raise ConversionError(
            f"rope_scaling.mscale_all_dim: {all_dim} without mscale is not supported; give both"
        )
    return {"mscale": float(mscale), "mscale_all_dim": float(all_dim)} if all_dim else {}


def latent_yarn_values(yarn: YarnConfig) -> dict[str, float]:
    """YaRN's attention factors as config.json has them."""
    if not yarn.mscale_all_dim and yarn.mscale == 1.0:
        return {}
    if not yarn.mscale_all_dim or not yarn.mscale:
        raise ConversionError(
            f"model.yarn: mscale: {yarn.mscale} with mscale_all_dim: {yarn.mscale_all_dim} is "
            "nothing that transformers computes; set both, or leave both out"
        )
    return {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim}


def latent_values(a: Architecture) -> dict[str, Any]:
    """The sizes of multi-latent attention, as config.json has them."""
    assert a.latent is not None
    return {
        "q_lora_rank": a.latent.query_rank,
        "kv_lora_rank": a.latent.rank,
        "qk_nope_head_dim": a.latent.plain_channels,
        "qk_rope_head_dim": a.latent.turned_channels,
        "v_head_dim": a.latent.value_channels,
        "rope_interleave": True,
        "attention_bias": False,
    }


def sigmoid_expert_values(a: Architecture) -> dict[str, Any]:
    """Experts whose routers choose by sigmoid scores, as config.json has them."""
    assert a.routing is not None and a.experts_per_token is not None
    assert a.expert_ffn_hidden_size and a.shared_expert_ffn_hidden_size
    return {
        "n_routed_experts": a.num_experts,
        "num_experts_per_tok": a.experts_per_token,
        "moe_intermediate_size": a.expert_ffn_hidden_size,
        "first_k_dense_replace": a.expert_layers.count(False),
        "n_shared_experts": a.shared_expert_ffn_hidden_size // a.expert_ffn_hidden_size,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": a.experts_per_token > 1,
        "routed_scaling_factor": a.routing.scaling,
        "n_group": a.routing.num_groups or 1,
        "topk_group": a.routing.chosen_groups or 1,
        "num_nextn_predict_layers": a.mtp_layers,
    }
