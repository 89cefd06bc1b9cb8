"""What a model computes, in one record that both worlds' configurations are read into.

    config.json  <->  Architecture  <->  the `model` section of a run

What one side can say and the other cannot is refused by name, never dropped: a weight conversion
cannot show that the rotary base was lost.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_prefix.config import YarnConfig

FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen2_moe",
    "qwen3_moe",
    "mixtral",
    "mistral",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "minimax_m2",
)
"""Hugging Face's model_type of each family."""


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """The sizes of multi-latent attention (DeepSeek-V2, arXiv 2405.04434)."""

    query_rank: int | None
    """Of the compressed queries; None: queries are not compressed."""
    rank: int
    """Of the compressed keys and values."""
    plain_channels: int
    """Of each query and key that have no position."""
    turned_channels: int
    """Of each query and key that are turned by the position; all heads' keys share them."""
    value_channels: int
    """Of each value."""


@dataclass(frozen=True, kw_only=True)
class LinearAttention:
    """The sizes of gated delta nets (arXiv 2412.06464)."""

    convolution_width: int
    """Inputs that a token's convolution reads, its own among them."""
    key_heads: int
    """Of queries and keys; each serves as many heads of values."""
    value_heads: int
    key_channels: int
    """Of each query and key."""
    value_channels: int
    """Of each value."""

    @property
    def keys(self) -> int:
        """Channels of all keys."""
        return self.key_heads * self.key_channels

    @property
    def values(self) -> int:
        """Channels of all values."""
        return self.value_heads * self.value_channels


@dataclass(frozen=True, kw_only=True)
class SigmoidRouting:
    """How DeepSeek-V3's routers choose: by sigmoid scores plus a bias; the weights sum to 1."""

    scaling: float
    """What the experts' weights are multiplied by."""
    num_groups: int | None = None
    """Groups of experts that are chosen first; None: all experts at once."""
    chosen_groups: int | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes and choices that decide what a model computes."""

    family: str
    """Hugging Face's model_type, one of `FAMILIES`."""
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
    """Biases of the attention's output, of the MLP, and of routers."""
    qk_norm: bool
    qk_norm_all_heads: bool = False
    """It takes all heads of a token at once, and not each head alone."""
    rotary_base: int
    rotary_fraction: float = 1.0
    """Of each head's dimensions that are turned."""
    llama3_rope_factor: float | None = None
    """Of Llama 3's scaling of the rotary frequencies, whose other numbers Megatron fixes."""
    yarn: YarnConfig | None = None
    window: int | None = None
    """Keys that a query sees in layers with a sliding window, its own among them."""
    windowed_layers: tuple[bool, ...] = ()
    """For each layer whether it has the window; empty: none has."""
    sinks: bool = False
    """Every head learns a score of no key, which its softmax adds to those of the keys."""
    gate_limit: float | None = None
    """The MLP is gpt-oss': what enters it is clamped at this, its activation is quick GELU, and
    its linear half is 1 larger. None: the MLP is SwiGLU."""
    num_experts: int | None = None
    expert_ffn_hidden_size: int | None = None
    experts_per_token: int | None = None
    normalized_routing: bool = True
    """The chosen experts' weights sum to 1."""
    expert_layers: tuple[bool, ...] = ()
    """For each layer whether its MLP is made of experts."""
    shared_expert_ffn_hidden_size: int | None = None
    """Of the experts that every token passes, together."""
    shared_expert_gate: bool = False
    """A gate says for each token how much of the shared expert's output it takes."""
    routing: SigmoidRouting | None = None
    """None: routers choose by softmax."""
    latent: LatentAttention | None = None
    """None: queries, keys and values are not compressed."""
    linear: LinearAttention | None = None
    """Of the layers that are gated delta nets. With them come a gate of the output of softmax
    attention, and zero-centred norms. None: there is no such layer."""
    linear_layers: tuple[bool, ...] = ()
    """For each layer whether it is a gated delta net."""
    mtp_layers: int = 0
    """Layers that predict further tokens. They are like the last of the others."""
    mtp_computed: bool = False
    """The Megatron model has these layers; false: they are kept aside."""

    @property
    def computed_mtp_layers(self) -> int:
        """Layers that predict further tokens, of the Megatron model."""
        return self.mtp_layers if self.mtp_computed else 0

    def has_experts(self, layer: int) -> bool:
        """Whether the layer's MLP is made of experts; those that predict are counted last."""
        return bool(self.expert_layers) and self.expert_layers[min(layer, self.num_layers - 1)]

    @property
    def mixed_layers(self) -> bool:
        """Layers differ from each other."""
        return len(set(self.expert_layers)) > 1 or self.linear is not None

    @property
    def canonical_family(self) -> str:
        """The family whose folder is written where nothing says which: some compute the same."""
        return "qwen3_next" if self.family == "qwen3_5_moe_text" else self.family

    def differences(self, other: Architecture) -> list[str]:
        """Fields that differ, in words; the longest sequence and layers of MTP may."""
        return [
            f"{field.name} ({getattr(self, field.name)} and {getattr(other, field.name)})"
            for field in dataclasses.fields(self)
            if field.name not in ("max_length", "mtp_layers", "mtp_computed")
            and getattr(self, field.name) != getattr(other, field.name)
            and (field.name != "family" or self.canonical_family != other.canonical_family)
        ]
