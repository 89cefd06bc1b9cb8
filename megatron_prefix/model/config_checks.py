"""What is refused of a run's configuration, before and behind Megatron's config of the model."""

from __future__ import annotations

import typing
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prefix.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_prefix.config.bounds import refuse
from megatron_prefix.config.loader import ConfigError
from megatron_prefix.megatron.auxiliary_losses import auxiliary_losses
from megatron_prefix.megatron.gated_delta_net import delta_net_layers
from megatron_prefix.megatron.mamba import mamba_heads, mamba_layers
from megatron_prefix.megatron.releases import (
    option,
    position_embedding_types,
    release,
    replays_routes,
)
from megatron_prefix.megatron.transformer_keys import faults_of_transformer
from megatron_prefix.model.hybrid import faults_of_hybrid


def check_sections(
    model: ModelConfig, parallel: ParallelConfig, *, of_pattern: dict[str, Any]
) -> None:
    """What cannot be given to Megatron's config at all.

    Args:
        of_pattern: options that the model's hybrid pattern decides.

    Raises:
        ConfigError: see `transformer_config`.
    """
    refuse(faults_of_transformer(model.transformer, decided=of_pattern))
    refuse(faults_of_hybrid(model, parallel))
    known = position_embedding_types()
    if model.position_embedding_type not in known:
        raise ConfigError(
            f"model.position_embedding_type: {model.position_embedding_type} is not in "
            f"megatron-core {release()}, which knows {', '.join(known)}; choose "
            "one of these or install a newer release"
        )
    if model.transformer.get("num_moe_experts") is None:
        for name, without in (
            ("expert_model_parallel_size", 1),
            ("expert_tensor_parallel_size", None),
        ):
            if getattr(parallel, name) not in (1, None):
                raise ConfigError(
                    f"parallel.{name}: {getattr(parallel, name)} needs "
                    "model.transformer.num_moe_experts; set it, or set this to "
                    f"{'null' if without is None else without}"
                )


def check_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    config: TransformerConfig,
) -> None:
    """Combinations that Megatron's config of the model allows, and that do not run.

    Raises:
        ConfigError: see `transformer_config`.
    """
    if (model.position_embedding_type == "mrope") != (config.mrope_section is not None):
        raise ConfigError(
            f"model.transformer: mrope_section={config.mrope_section} does not go with "
            f"model.position_embedding_type: {model.position_embedding_type}; give both or neither"
        )
    _check_recurrent_layers(config)
    if config.mtp_num_layers:
        _check_predictions(model, config)
    if training.share_across_microbatches:
        _check_series(config)
    if training.replayed_routes in ("exact", "first"):
        _check_replay(training, config)
    _check_sizes(model, config)
    if any(mamba_layers(config)):
        _check_mamba(config)
    if config.num_moe_experts is not None:
        _check_experts(config)
    if config.pipeline_model_parallel_size > 1 and model.hybrid_layer_pattern is None:
        _check_stages(model, parallel, config)


def _check_predictions(model: ModelConfig, config: TransformerConfig) -> None:
    """What does not go with multi-token prediction, and Megatron does not refuse."""
    pipeline = config.pipeline_model_parallel_size
    if model.position_embedding_type == "learned_absolute" and pipeline > 1:
        raise ConfigError(
            "model.position_embedding_type: learned_absolute with model.transformer."
            f"mtp_num_layers: {config.mtp_num_layers} and parallel.pipeline_model_parallel_size: "
            f"{pipeline}: the last stage has a table of positions of its own, which Megatron does "
            "not keep equal to the first stage's; use rotary positions or one stage, or set "
            "mtp_num_layers: null"
        )
    if model.share_embeddings_and_output_weights and pipeline > 1:
        raise ConfigError(
            "model.share_embeddings_and_output_weights: true with model.transformer."
            f"mtp_num_layers: {config.mtp_num_layers} and parallel.pipeline_model_parallel_size: "
            f"{pipeline}: the last stage has an embedding and an output layer, which Megatron "
            "neither keeps equal nor can write into a checkpoint; use one stage, or "
            "set mtp_num_layers: null"
        )
    if config.mtp_loss_scaling_factor is None:
        raise ConfigError(
            "model.transformer.mtp_loss_scaling_factor: null, with mtp_num_layers: "
            f"{config.mtp_num_layers}; give the factor of that loss, such as 0.1"
        )


def _check_series(config: TransformerConfig) -> None:
    """What does not go with microbatches that share a prompt."""
    if config.mtp_num_layers:
        raise ConfigError(
            "training.share_across_microbatches: true with model.transformer.mtp_num_layers: "
            f"{config.mtp_num_layers}: the rows of multi-token prediction have the prompt's too; "
            "set share_across_microbatches: false, or mtp_num_layers: null"
        )
    if auxiliary_losses(config):
        raise ConfigError(
            f"training.share_across_microbatches: true with model.transformer.moe_aux_loss_coeff: "
            f"{config.moe_aux_loss_coeff}: an auxiliary loss is made of the tokens of a whole "
            "microbatch, whose rows then run one after the other; set "
            "share_across_microbatches: false, or moe_aux_loss_coeff: 0"
        )


def _check_replay(training: TrainingConfig, config: TransformerConfig) -> None:
    key = f"training.replayed_routes: {training.replayed_routes}"
    if not replays_routes():
        raise ConfigError(
            f"{key}: the routers of megatron-core {release()} cannot be given routes; install 0.16 "
            "or newer"
        )
    if option(config, "mtp_num_layers"):
        raise ConfigError(
            f"{key} with model.transformer.mtp_num_layers: {config.mtp_num_layers}: records have "
            "no routes of these layers; set one of them to null"
        )


def _check_recurrent_layers(config: TransformerConfig) -> None:
    """Where gated delta nets are in the model."""
    every = option(config, "linear_attention_freq")
    name = "model.transformer.linear_attention_freq"
    if option(config, "experimental_attention_variant") is None:
        if every is not None:
            raise ConfigError(
                f"{name}: {every} needs model.transformer.experimental_attention_variant: "
                "gated_delta_net; set that, or remove it"
            )
        return
    if isinstance(every, list) and len(every) != config.num_layers:
        raise ConfigError(f"{name}: {every} needs one entry for each of {config.num_layers} layers")
    if isinstance(every, int) and every < 1:
        raise ConfigError(f"{name}: {every} must be at least 1: one in so many layers attends")
    if not any(delta_net_layers(config)):
        raise ConfigError(
            f"{name}: {every}: no layer is a gated delta net then; change it, or remove it and "
            "model.transformer.experimental_attention_variant"
        )


def _refuse(config: TransformerConfig, key: str, what: str) -> typing.NoReturn:
    raise ConfigError(f"model.transformer.{key}: {getattr(config, key)} {what}")


def _check_sizes(model: ModelConfig, config: TransformerConfig) -> None:
    """What Megatron would only find, by an assertion, when it builds the layers."""
    tensor = config.tensor_model_parallel_size
    groups = config.num_query_groups
    if config.num_attention_heads % groups:
        _refuse(
            config,
            "num_query_groups",
            f"does not divide num_attention_heads: {config.num_attention_heads}",
        )
    if groups % tensor:
        _refuse(
            config, "num_query_groups", f"does not divide by tensor_model_parallel_size: {tensor}"
        )
    if config.ffn_hidden_size % tensor:
        _refuse(
            config, "ffn_hidden_size", f"does not divide by tensor_model_parallel_size: {tensor}"
        )
    if model.position_embedding_type in ("rope", "mrope", "yarn"):
        key, what = "kv_channels", "(the size of a head)"
        if config.multi_latent_attention:
            key, what = "qk_pos_emb_head_dim", "(the part of a head that has positions)"
        rotated = int(getattr(config, key) * model.rotary_percent)
        if rotated < 2 or rotated % 2:
            _refuse(
                config,
                key,
                f"{what} times rotary_percent: {model.rotary_percent} gives "
                f"{rotated} rotated channels; it must be an even number of at least 2",
            )
    if config.normalization not in ("LayerNorm", "RMSNorm"):
        _refuse(config, "normalization", "is none that GPTModel has; choose LayerNorm or RMSNorm")


def _check_mamba(config: TransformerConfig) -> None:
    """The same of Mamba's layers."""
    if config.mamba_num_heads is None and 2 * config.hidden_size % config.mamba_head_dim:
        _refuse(
            config,
            "mamba_head_dim",
            f"does not divide twice the hidden_size: {config.hidden_size}; set mamba_num_heads",
        )
    heads, groups = mamba_heads(config), config.mamba_num_groups
    tensor, context = config.tensor_model_parallel_size, config.context_parallel_size
    if heads % groups:
        _refuse(config, "mamba_num_groups", f"does not divide the {heads} heads")
    if groups % tensor:
        _refuse(
            config, "mamba_num_groups", f"does not divide by tensor_model_parallel_size: {tensor}"
        )
    local = groups // tensor
    # Megatron asks for both whatever the kind of communication.
    if heads % (tensor * context):
        _refuse(
            config,
            "mamba_num_heads",
            f"({heads} heads) does not divide by tensor_model_parallel_size: {tensor} times "
            f"context_parallel_size: {context}",
        )
    if local % context and context % local:
        _refuse(
            config,
            "mamba_num_groups",
            f"over tensor_model_parallel_size: {tensor} is neither a multiple nor a divisor of "
            f"context_parallel_size: {context}",
        )


def _check_experts(config: TransformerConfig) -> None:
    """The same of the experts."""
    if config.num_moe_experts % config.expert_model_parallel_size:
        _refuse(
            config,
            "num_moe_experts",
            f"does not divide by expert_model_parallel_size: {config.expert_model_parallel_size}",
        )
    split = config.expert_tensor_parallel_size
    if config.use_cpu_initialization and split > 1 and config.expert_model_parallel_size > 1:
        raise ConfigError(
            f"parallel.expert_tensor_parallel_size: {split} with expert_model_parallel_size: "
            f"{config.expert_model_parallel_size} gathers pieces of unequal sizes, which the "
            "CPU's process groups (gloo) cannot; set it to 1 or null"
        )
    if config.moe_ffn_hidden_size % split:
        _refuse(
            config,
            "moe_ffn_hidden_size",
            f"does not divide by expert_tensor_parallel_size: {split}",
        )
    if config.moe_router_topk > config.num_moe_experts:
        _refuse(config, "moe_router_topk", f"exceeds num_moe_experts: {config.num_moe_experts}")
    frequency = config.moe_layer_freq
    if isinstance(frequency, list) and len(frequency) != config.num_layers:
        _refuse(config, "moe_layer_freq", f"needs one entry for each of {config.num_layers} layers")


def _check_stages(model: ModelConfig, parallel: ParallelConfig, config: TransformerConfig) -> None:
    """Whether every stage and chunk gets as many layers, unless the model says how many."""
    layers = config.num_layers
    stages = config.pipeline_model_parallel_size * parallel.num_model_chunks
    if layers % stages and not model.transformer.keys() & {
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "pipeline_model_parallel_layout",
        "account_for_embedding_in_pipeline_split",
    }:
        raise ConfigError(
            f"model.transformer.num_layers: {layers} does not divide by the {stages} pipeline "
            "stages and chunks; change one of them"
        )
