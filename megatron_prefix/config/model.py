"""The `model` section: which GPTModel or HybridModel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_prefix.config.bounds import below, refuse

_DECIDED_BY_PATTERN = {
    "num_layers",
    "moe_layer_freq",
    "experimental_attention_variant",
    "linear_attention_freq",
    "is_hybrid_model",
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
}
"""Fields of `transformer`."""


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN's scaling of the rotary frequencies (arXiv 2309.00071)."""

    rotary_scaling_factor: float
    """The longest position divided by `original_max_position_embeddings`."""
    original_max_position_embeddings: int
    """Positions that the model was trained for before it was scaled."""
    beta_fast: float = 32.0
    """Frequencies that turn more often than this within the original positions stay as they are."""
    beta_slow: float = 1.0
    """Frequencies that turn less often than this within the original positions are divided by
    `rotary_scaling_factor`; those between the two are blended."""
    mscale: float = 1.0
    """YaRN's attention factor: its numerator."""
    mscale_all_dim: float = 0.0
    """YaRN's attention factor: its denominator; 0: a denominator of 1."""
    correction_range_round_to_int: bool = True
    """Round the borders of the blended frequencies to whole dimensions."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The GPTModel to build, or the HybridModel."""

    vocab_size: int
    """Tokens of the vocabulary, without padding."""
    max_sequence_length: int
    """Tokens of the longest prompt with its response."""
    position_embedding_type: Literal["rope", "mrope", "yarn", "learned_absolute", "none"] = "rope"
    """How positions enter the model. `mrope` has three positions a token, which records of `file`
    may give; a run has no image encoder, and embeds placeholders of images as any token."""
    rotary_percent: float = 1.0
    """Fraction of each head's dimensions that is rotated."""
    rotary_base: int = 10000
    """Base of the rotary frequencies (Hugging Face: `rope_theta`)."""
    rope_scaling: bool = False
    """Llama 3's scaling of the rotary frequencies."""
    rope_scaling_factor: float = 8.0
    """Factor of Llama 3's scaling; used with `rope_scaling: true`."""
    yarn: YarnConfig | None = None
    """YaRN's constants; required by `position_embedding_type: yarn`."""
    share_embeddings_and_output_weights: bool = False
    """The output layer uses the weights of the word embedding."""
    make_vocab_size_divisible_by: int = 1
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""
    activation: Literal["gelu", "silu", "relu", "squared_relu", "quick_gelu"] = "silu"
    """The MLP's activation; with `gated_linear_unit: true`, silu makes SwiGLU. quick_gelu(x) is
    x sigmoid(1.702 x), as gpt-oss has it."""
    qk_norm_all_heads: bool = False
    """The norms that `qk_layernorm: true` asks for take all heads of a token at once, as
    MiniMax-M2's do, and not each head alone."""
    hybrid_layer_pattern: str | None = None
    """Build Megatron's HybridModel (megatron-core 0.18 or newer) of these layers: M Mamba-2, G a
    gated delta net, * attention, - a dense MLP, E experts, | before a layer that begins another
    pipeline stage, such as `M-M-|*-GE`. It says how many layers there are, and which have
    experts."""
    transformer: dict[str, Any] = field(default_factory=dict)
    """Any other field of Megatron's `TransformerConfig`: `num_layers`, `hidden_size`, ..."""

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        yield from below(self, 1, "vocab_size", "make_vocab_size_divisible_by")
        # One position predicts, another is predicted.
        yield from below(self, 2, "max_sequence_length")
        if not 0 < self.rotary_percent <= 1:
            yield f"rotary_percent: {self.rotary_percent} must be in (0, 1]"
        if (self.position_embedding_type == "yarn") != (self.yarn is not None):
            yield (
                f"yarn: {self.yarn} does not go with position_embedding_type: "
                f"{self.position_embedding_type}; give both or neither"
            )
        if self.hybrid_layer_pattern is not None:
            # Here, since help and most configurations do without NumPy.
            from megatron_prefix.layout.hybrid_pattern import faults_of_pattern

            pattern = self.hybrid_layer_pattern
            if not pattern:
                yield "hybrid_layer_pattern: '' has no layer; give a symbol for each, or null"
            for fault in faults_of_pattern(pattern):
                yield f"hybrid_layer_pattern: {pattern}: {fault}"
            for key in _DECIDED_BY_PATTERN & self.transformer.keys():
                yield (
                    f"transformer.{key}: {self.transformer[key]} is decided by "
                    f"hybrid_layer_pattern: {pattern}; remove it"
                )
        if self.qk_norm_all_heads:
            for key, needed, default in (
                ("qk_layernorm", True, False),
                ("normalization", "RMSNorm", "RMSNorm"),
                ("qk_l2_norm", False, False),
                ("multi_latent_attention", False, False),
            ):
                found = self.transformer.get(key, default)
                if found != needed:
                    yield (
                        f"qk_norm_all_heads: true needs transformer.{key}: {needed}, and it is "
                        f"{found!r}"
                    )

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """The vocabulary that the embedding is built for."""
        multiple = self.make_vocab_size_divisible_by * tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple
