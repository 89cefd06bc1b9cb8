"""The HybridModel of a run: what its pattern decides of Megatron's config, and the model."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from typing import Any

from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prefix.config import ModelConfig, ParallelConfig
from megatron_prefix.layer_spec import prefix_grouped
from megatron_prefix.layers.hybrid import prefix_hybrid_model
from megatron_prefix.layout.hybrid_pattern import (
    EXPERTS,
    GATED_DELTA_NET,
    layers_of,
    stages_of,
)
from megatron_prefix.megatron.expert_biases import let_experts_have_biases
from megatron_prefix.megatron.hybrid_model import (
    HybridModel,
    hybrid_stack_spec,
    require_hybrid_model,
)

_OF_OTHER_MODELS = {
    "multi_latent_attention": "a HybridModel has multi-latent attention in layers of its own, "
    "which do not share prefixes",
    "qk_layernorm": "Megatron's HybridModel has no such norms",
    "heterogeneous_block_specs": "the pattern says what each layer is",
    "mtp_num_layers": "multi-token prediction shares prefixes in a GPTModel only",
}
"""Options of `model.transformer` that are refused beside a pattern, if they are set."""


def hybrid_options(model: ModelConfig) -> dict[str, Any]:
    """What the pattern decides of Megatron's `TransformerConfig`; {} for a GPTModel."""
    if model.hybrid_layer_pattern is None:
        return {}
    layers = layers_of(model.hybrid_layer_pattern)
    # It scales the first weights of the output projections.
    options: dict[str, Any] = {"num_layers": len(layers), "is_hybrid_model": True}
    if EXPERTS in layers:
        options["moe_layer_freq"] = [int(kind == EXPERTS) for kind in layers]
    if GATED_DELTA_NET in layers:
        options["experimental_attention_variant"] = "gated_delta_net"
        options["linear_attention_freq"] = [int(kind == GATED_DELTA_NET) for kind in layers]
    return options


def faults_of_hybrid(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Why a run cannot have this HybridModel; nothing for a GPTModel."""
    pattern = model.hybrid_layer_pattern
    if pattern is None:
        return
    key = f"model.hybrid_layer_pattern: {pattern}"
    try:
        require_hybrid_model()
    except ValueError as error:
        yield f"{key}: {error}"
        return
    transformer = model.transformer
    for name, why in _OF_OTHER_MODELS.items():
        if transformer.get(name):
            yield f"model.transformer.{name}: {transformer[name]} with {key}: {why}; remove one"
    known = _position_embedding_types()
    if model.position_embedding_type not in known:
        yield (
            f"model.position_embedding_type: {model.position_embedding_type} with {key}: a "
            f"HybridModel has {', '.join(known)}; choose one of these"
        )
    if model.rope_scaling:
        yield (
            f"model.rope_scaling: true with {key}: a HybridModel has no such scaling; set it to "
            "false"
        )
    has_experts = transformer.get("num_moe_experts") is not None
    if has_experts != (EXPERTS in pattern):
        yield (
            f"{key} with model.transformer.num_moe_experts: {transformer.get('num_moe_experts')}: "
            f"layers with experts are {EXPERTS} in the pattern; give both or neither"
        )
    stages, found = _num_stages(parallel), len(stages_of(pattern))
    if stages != found:
        yield (
            f"{key} has {found} stages, and the run has {stages} (parallel."
            "pipeline_model_parallel_size x virtual_pipeline_model_parallel_size); write | where "
            "each further one begins"
        )


def _num_stages(parallel: ParallelConfig) -> int:
    return parallel.pipeline_model_parallel_size * parallel.num_model_chunks


def _position_embedding_types() -> tuple[str, ...]:
    parameter = inspect.signature(HybridModel.__init__).parameters["position_embedding_type"]
    return typing.get_args(parameter.annotation)


def build_hybrid_model(
    model: ModelConfig,
    config: TransformerConfig,
    *,
    use_transformer_engine: bool,
    vp_stage: int | None = None,
    shared_prefixes: bool = True,
) -> LanguageModule:
    """This rank's HybridModel (chunk) in the current parallel state.

    Args:
        config: with the options of `hybrid_options`.
        use_transformer_engine: its modules, or Megatron's local ones.
        vp_stage: the chunk's index under interleaved pipelining.
        shared_prefixes: False builds Megatron's unmodified model.
    """
    spec = hybrid_stack_spec(config, use_transformer_engine=use_transformer_engine)
    built = (prefix_hybrid_model() if shared_prefixes else HybridModel)(
        config=config,
        hybrid_stack_spec=prefix_grouped(spec) if shared_prefixes else spec,
        vocab_size=model.padded_vocab_size(config.tensor_model_parallel_size),
        max_sequence_length=model.max_sequence_length,
        hybrid_layer_pattern=model.hybrid_layer_pattern,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        vp_stage=vp_stage,
    )
    let_experts_have_biases(built)
    return built
