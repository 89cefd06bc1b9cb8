"""Experts in config.json: how each family names their sizes, and how its routers choose."""

from __future__ import annotations

from typing import Any

from megatron_prefix.conversion.architecture import Architecture, SigmoidRouting
from megatron_prefix.conversion.errors import ConversionError
from megatron_prefix.conversion.hf_deepseek import read_sigmoid_experts, sigmoid_expert_values

_QWEN = ("qwen3_moe", "qwen2_moe", "qwen3_next", "qwen3_5_moe_text")
_SWIGLU_ALPHA = 1.702
"""What Megatron's quick GELU multiplies by, and gpt-oss."""


def read_experts(config: Any, family: str) -> dict[str, Any]:
    """Fields of an `Architecture` with experts; nothing for families without any.

    Raises:
        ConversionError: Megatron cannot compute them, naming the key and its value.
    """
    if family in ("deepseek_v3", "glm4_moe"):
        return read_sigmoid_experts(config)
    if family in _QWEN:
        found = _read_qwen(config, family)
    elif family in ("mixtral", "minimax_m2", "gpt_oss"):
        found = {
            "num_experts": config.num_local_experts,
            "expert_ffn_hidden_size": config.intermediate_size,
            "expert_layers": (True,) * config.num_hidden_layers,
        }
    else:
        return {}
    chosen = found["experts_per_token"] = config.num_experts_per_tok
    if family == "minimax_m2":
        found["routing"] = _read_minimax_routing(config)
    if family == "gpt_oss":
        found |= {"gate_limit": _read_gate_limit(config), "sinks": True}
    if chosen == 1 and found.get("normalized_routing", True):
        raise ConversionError(
            f"num_experts_per_tok: {chosen} with normalized weights makes the router constant"
        )
    return found


def _read_qwen(config: Any, family: str) -> dict[str, Any]:
    # Qwen3.5 has neither: all layers have experts, whose weights are normalized.
    dense = getattr(config, "mlp_only_layers", None) or []
    every = getattr(config, "decoder_sparse_step", 1)
    layers = tuple(i not in dense and (i + 1) % every == 0 for i in range(config.num_hidden_layers))
    if not any(layers):
        raise ConversionError(f"decoder_sparse_step: {every} leaves no layer with experts")
    found = {
        "num_experts": config.num_experts,
        "expert_ffn_hidden_size": config.moe_intermediate_size,
        "normalized_routing": bool(getattr(config, "norm_topk_prob", True)),
        "expert_layers": layers,
    }
    if family != "qwen3_moe":
        found["shared_expert_ffn_hidden_size"] = config.shared_expert_intermediate_size
        found["shared_expert_gate"] = True
    return found


def _read_minimax_routing(config: Any) -> SigmoidRouting:
    for name, of in (
        ("scoring_func", "sigmoid"),
        ("use_routing_bias", True),
        ("shared_intermediate_size", 0),
    ):
        if getattr(config, name, of) != of:
            raise ConversionError(
                f"{name}: {getattr(config, name)!r} is not supported; transformers and this "
                f"conversion have {of!r}"
            )
    if config.router_jitter_noise:
        raise ConversionError(
            f"router_jitter_noise: {config.router_jitter_noise} is not supported: routers would "
            "choose otherwise each time; set it to 0"
        )
    return SigmoidRouting(scaling=1.0)


def _read_gate_limit(config: Any) -> float:
    alpha = getattr(config, "swiglu_alpha", _SWIGLU_ALPHA)
    if alpha != _SWIGLU_ALPHA:
        raise ConversionError(
            f"swiglu_alpha: {alpha} is not supported; Megatron's quick GELU has {_SWIGLU_ALPHA}"
        )
    return float(getattr(config, "swiglu_limit", 7.0))


def expert_values(a: Architecture) -> dict[str, Any]:
    """The experts, as config.json has them; nothing for families without any."""
    if a.family in ("deepseek_v3", "glm4_moe"):
        return sigmoid_expert_values(a)
    if a.num_experts is None:
        return {}
    values: dict[str, Any] = {"num_experts_per_tok": a.experts_per_token}
    if a.family in _QWEN:
        values.update(num_experts=a.num_experts, moe_intermediate_size=a.expert_ffn_hidden_size)
    if a.family in _QWEN and a.family != "qwen3_5_moe_text":
        values.update(
            norm_topk_prob=a.normalized_routing,
            decoder_sparse_step=1,
            mlp_only_layers=[i for i, experts in enumerate(a.expert_layers) if not experts],
        )
    elif a.family not in _QWEN:
        values["num_local_experts"] = a.num_experts
    if a.shared_expert_gate:
        values["shared_expert_intermediate_size"] = a.shared_expert_ffn_hidden_size
    if a.family == "minimax_m2":
        values.update(scoring_func="sigmoid", use_routing_bias=True)
    if a.family == "gpt_oss":
        values.update(swiglu_limit=a.gate_limit, swiglu_alpha=_SWIGLU_ALPHA)
    return values
