"""What a model computes, in one record that both worlds' configurations are read into.

    config.json  <->  Architecture  <->  the `model` section of a run

What one side can say and the other cannot is refused by name, never dropped: a weight conversion
cannot show that the rotary base was lost.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prefix.config import ModelConfig, YarnConfig
from megatron_prefix.conversion.errors import ConversionError


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes and choices that decide what a model computes."""

    family: str
    """Hugging Face's model_type: llama, qwen2, qwen3, qwen3_moe or mixtral."""
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    """Of dense layers (where there are any)."""
    vocab_size: int
    max_length: int
    norm_epsilon: float
    tied_embeddings: bool
    qkv_bias: bool
    """Biases of query, key and value."""
    linear_bias: bool
    """Biases of the attention's output and of the MLP."""
    qk_norm: bool
    rotary_base: int
    llama3_rope_factor: float | None = None
    """Of Llama 3's scaling of the rotary frequencies, whose other numbers Megatron fixes."""
    yarn: YarnConfig | None = None
    num_experts: int | None = None
    expert_ffn_hidden_size: int | None = None
    experts_per_token: int | None = None
    normalized_routing: bool = True
    """The chosen experts' weights sum to 1."""
    expert_layers: tuple[bool, ...] = ()
    """For each layer whether its MLP is made of experts."""

    def has_experts(self, layer: int) -> bool:
        """Whether the layer's MLP is made of experts."""
        return bool(self.expert_layers) and self.expert_layers[layer]

    @property
    def mixed_layers(self) -> bool:
        """Layers differ from each other."""
        return len(set(self.expert_layers)) > 1

    def differences(self, other: Architecture) -> list[str]:
        """Fields that differ, in words; the longest sequence may."""
        return [
            f"{field.name} ({getattr(self, field.name)} and {getattr(other, field.name)})"
            for field in dataclasses.fields(self)
            if field.name != "max_length"
            and getattr(self, field.name) != getattr(other, field.name)
        ]


def to_model_config(architecture: Architecture) -> ModelConfig:
    """The `model` section of a run."""
    a = architecture
    transformer: dict[str, Any] = {
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_query_groups": a.num_query_groups,
        "kv_channels": a.head_dim,
        "ffn_hidden_size": a.ffn_hidden_size,
        "gated_linear_unit": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": a.norm_epsilon,
        "add_bias_linear": a.linear_bias,
        "add_qkv_bias": a.qkv_bias,
        "qk_layernorm": a.qk_norm,
    }
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
    return ModelConfig(
        vocab_size=a.vocab_size,
        max_sequence_length=a.max_length,
        position_embedding_type="rope" if a.yarn is None else "yarn",
        rotary_base=a.rotary_base,
        rope_scaling=a.llama3_rope_factor is not None,
        rope_scaling_factor=a.llama3_rope_factor or 8.0,
        yarn=a.yarn,
        share_embeddings_and_output_weights=a.tied_embeddings,
        activation="silu",
        transformer=transformer,
    )


# Fields of TransformerConfig that say how a model is computed or trained, not what it is.
_OF_EXECUTION = {
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "apply_rope_fusion",
    "attention_backend",
    "attention_dropout",
    "attention_softmax_in_fp32",
    "batch_p2p_comm",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "cp_comm_type",
    "cross_entropy_loss_fusion",
    "deterministic_mode",
    "distribute_saved_activations",
    "expert_tensor_parallel_size",
    "fp32_residual_connection",
    "gradient_accumulation_fusion",
    "hidden_dropout",
    "init_method_std",
    "masked_softmax_fusion",
    "memory_efficient_layer_norm",
    "moe_aux_loss_coeff",
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "moe_router_dtype",
    "moe_router_fusion",
    "moe_router_load_balancing_type",
    "moe_token_dispatcher_type",
    "moe_z_loss_coeff",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "overlap_p2p_comm",
    "persist_layer_norm",
    "pipeline_model_parallel_layout",
}
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
}


def from_model_config(model: ModelConfig) -> Architecture:
    """Read the `model` section of a run.

    Raises:
        ConversionError: an option that no supported Hugging Face family has.
    """
    t = model.transformer
    _refuse_unless(
        ("model.position_embedding_type", model.position_embedding_type, ("rope", "yarn")),
        ("model.rotary_percent", model.rotary_percent, (1.0,)),
        ("model.activation", model.activation, ("silu",)),
        ("model.transformer.gated_linear_unit", t.get("gated_linear_unit", False), (True,)),
        ("model.transformer.normalization", t.get("normalization", "RMSNorm"), ("RMSNorm",)),
    )
    defaults = {f.name: f.default for f in dataclasses.fields(TransformerConfig)}
    for key, value in t.items():
        if key not in _READ | _OF_EXECUTION and value != defaults.get(key):
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
    experts = t.get("num_moe_experts")
    expert_layers: tuple[bool, ...] = ()
    if experts is not None:
        frequency = t.get("moe_layer_freq", 1)
        expert_layers = tuple(
            (i % frequency == 0) if isinstance(frequency, int) else bool(frequency[i])
            for i in range(t["num_layers"])
        )
    normalized = not t.get("moe_router_pre_softmax", False)
    family = _family(experts is not None, qk_norm, qkv_bias and not linear_bias)
    expert_ffn = (t.get("moe_ffn_hidden_size") or ffn) if experts else None
    if family == "mixtral":
        ffn = expert_ffn  # Mixtral has one size, and no layer without experts
    architecture = Architecture(
        family=family,
        num_layers=t["num_layers"],
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=t.get("num_query_groups") or heads,
        head_dim=t.get("kv_channels") or hidden // heads,
        ffn_hidden_size=ffn,
        vocab_size=model.vocab_size,
        max_length=model.max_sequence_length,
        norm_epsilon=t.get("layernorm_epsilon", defaults["layernorm_epsilon"]),
        tied_embeddings=model.share_embeddings_and_output_weights,
        qkv_bias=qkv_bias,
        linear_bias=linear_bias,
        qk_norm=qk_norm,
        rotary_base=model.rotary_base,
        llama3_rope_factor=model.rope_scaling_factor if model.rope_scaling else None,
        yarn=model.yarn,
        num_experts=experts,
        expert_ffn_hidden_size=expert_ffn,
        experts_per_token=t.get("moe_router_topk", 2) if experts else None,
        normalized_routing=normalized,
        expert_layers=expert_layers,
    )
    _refuse_mixture(architecture)
    return architecture


FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral")


def _family(experts: bool, qk_norm: bool, qkv_bias_only: bool) -> str:
    if experts:
        return "qwen3_moe" if qk_norm else "mixtral"
    if qk_norm:
        return "qwen3"
    return "qwen2" if qkv_bias_only else "llama"


def _refuse_mixture(a: Architecture) -> None:
    """Combinations of options that no family has."""
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


def _refuse_unless(*options: tuple[str, Any, tuple[Any, ...]]) -> None:
    for name, value, accepted in options:
        if value not in accepted:
            raise ConversionError(
                f"{name}: {value!r} is nothing that a Hugging Face config.json of the supported "
                f"families ({', '.join(FAMILIES)}) can say; they have "
                f"{' or '.join(map(repr, accepted))}"
            )
