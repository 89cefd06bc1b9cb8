"""Megatron's config of the model that a run's configuration describes, or why there can be none."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions import fused_bias_geglu
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_prefix.attention.layer_kinds import set_hybrid_pattern
from megatron_prefix.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_prefix.config.bounds import refuse
from megatron_prefix.config.loader import ConfigError
from megatron_prefix.megatron.auxiliary_losses import auxiliary_losses
from megatron_prefix.megatron.comm_type_list import repair_comm_type_list
from megatron_prefix.megatron.gated_delta_net import recurrent_layers
from megatron_prefix.megatron.options import UnsupportedOptionError, refuse_unsupported
from megatron_prefix.megatron.options.layers import MARK_OF_PREDICTING_MODELS
from megatron_prefix.megatron.recurrent_config import config_with_context_parallelism
from megatron_prefix.megatron.releases import (
    option,
    position_embedding_types,
    release,
    replays_routes,
)
from megatron_prefix.megatron.transformer_keys import faults_of_transformer
from megatron_prefix.model.hybrid import faults_of_hybrid, hybrid_options

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "squared_relu": lambda x: torch.pow(F.relu(x), 2),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig
) -> TransformerConfig:
    """Megatron's config of the model.

    Raises:
        ConfigError: a key of `model.transformer` that Megatron does not know, of a wrong type, that
            another section decides, or whose combination Megatron or shared prefixes refuse.
    """
    of_pattern = hybrid_options(model)
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
    dtype = DTYPES[training.dtype]
    on_cpu = training.device == "cpu"
    options: dict[str, Any] = {
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "moe_router_load_balancing_type": "none",
        # Microbatches differ in length, which Megatron's variable lengths only allow with it.
        "moe_token_dispatcher_type": "alltoall",
        **model.transformer,
        **of_pattern,
        "activation_func": _activation(model.activation, on_cpu=on_cpu),
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": (
            parallel.virtual_pipeline_model_parallel_size if parallel.num_model_chunks > 1 else None
        ),
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_split,
        "sequence_parallel": parallel.uses_sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "variable_seq_lengths": parallel.pipeline_model_parallel_size > 1,
        # Our weights hold every denominator, so Megatron must not divide (see training/step.py).
        "calculate_per_token_loss": True,
        "use_cpu_initialization": on_cpu,
        "deterministic_mode": training.deterministic,
    }
    # Before release 0.17 Megatron takes 0 for a model whose layers are missing.
    options["mtp_num_layers"] = options.get("mtp_num_layers") or None
    if isinstance(options.get("window_size"), list):
        # Megatron 0.15 remembers masks by it, which a list of YAML cannot be.
        options["window_size"] = tuple(options["window_size"])
    if parallel.num_model_chunks > 1:
        # Otherwise two ranks pair up sends and receives of different chunks.
        options.update(overlap_p2p_comm=True, batch_p2p_comm=False)
    if on_cpu:
        for fusion in (
            "bias_activation_fusion",
            "bias_dropout_fusion",
            "masked_softmax_fusion",
            "gradient_accumulation_fusion",
            "persist_layer_norm",
            "apply_rope_fusion",
            "moe_permute_fusion",
        ):
            options.setdefault(fusion, False)
    if training.recompute == "full":
        options.update(
            recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
        )
    elif training.recompute == "selective":
        options.update(recompute_granularity="selective", recompute_modules=["core_attn"])
    try:
        if model.transformer.get("multi_latent_attention"):
            config = MLATransformerConfig(**options, **_latent_rotary(model))
        else:
            config = config_with_context_parallelism(TransformerConfig, **options)
        if model.yarn is not None and not config.multi_latent_attention:
            # Megatron reads these off the config, but does not declare them.
            for name, value in dataclasses.asdict(model.yarn).items():
                setattr(config, f"yarn_{name}", value)
        # `build_gpt_model` builds it by `prefix_gpt_model`.
        setattr(config, MARK_OF_PREDICTING_MODELS, True)
        if model.hybrid_layer_pattern is not None:
            set_hybrid_pattern(config, model.hybrid_layer_pattern)
        refuse_unsupported(config)
        repair_comm_type_list(config)
    except UnsupportedOptionError as error:
        raise ConfigError(f"model.transformer: {error}") from error
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"model.transformer: Megatron-Core refuses it: {error}") from error
    if (model.position_embedding_type == "mrope") != (config.mrope_section is not None):
        raise ConfigError(
            f"model.transformer: mrope_section={config.mrope_section} does not go with "
            f"model.position_embedding_type: {model.position_embedding_type}; give both or neither"
        )
    _check_recurrent_layers(config)
    if config.mtp_num_layers:
        _check_predictions(model, config)
    if training.share_across_microbatches and config.mtp_num_layers:
        raise ConfigError(
            "training.share_across_microbatches: true with model.transformer.mtp_num_layers: "
            f"{config.mtp_num_layers}: the rows of multi-token prediction have the prompt's too; "
            "set share_across_microbatches: false, or mtp_num_layers: null"
        )
    if training.share_across_microbatches and auxiliary_losses(config):
        raise ConfigError(
            f"training.share_across_microbatches: true with model.transformer.moe_aux_loss_coeff: "
            f"{config.moe_aux_loss_coeff}: an auxiliary loss is made of the tokens of a whole "
            "microbatch, whose rows then run one after the other; set "
            "share_across_microbatches: false, or moe_aux_loss_coeff: 0"
        )
    if training.replayed_routes in ("exact", "first"):
        _check_replay(training, config)
    _check_sizes(model, config)
    if config.pipeline_model_parallel_size > 1 and model.hybrid_layer_pattern is None:
        layers, stages = (
            config.num_layers,
            (config.pipeline_model_parallel_size * parallel.num_model_chunks),
        )
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
    return config


def _activation(name: str, *, on_cpu: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    if name == "quick_gelu" and not on_cpu:
        # Megatron's fusions look for this very function, which torch compiles at its first call.
        return getattr(fused_bias_geglu, name, _ACTIVATIONS[name])
    return _ACTIVATIONS[name]


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


def _latent_rotary(model: ModelConfig) -> dict[str, Any]:
    """Of multi-latent attention, whose rotary embedding is its own: the model's, in its fields."""
    if model.position_embedding_type not in ("rope", "yarn"):
        raise ValueError(
            f"model.position_embedding_type: {model.position_embedding_type} with "
            "multi_latent_attention, which has rope or yarn"
        )
    if model.rope_scaling:
        raise ValueError(
            "model.rope_scaling: true with multi_latent_attention, which has no such scaling; set "
            "it to false"
        )
    common = {
        "rope_type": model.position_embedding_type,
        "rotary_base": model.rotary_base,
        "rotary_percent": model.rotary_percent,
    }
    if model.yarn is None:
        # Megatron multiplies the scores by YaRN's factor for plain rotary embedding as well.
        return {**common, "rotary_scaling_factor": 1.0}
    yarn = dataclasses.asdict(model.yarn)
    if not yarn.pop("correction_range_round_to_int"):
        raise ValueError(
            "model.yarn.correction_range_round_to_int: false with multi_latent_attention, which "
            "rounds; set it to true"
        )
    return {**common, **yarn}


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
    if not any(recurrent_layers(config)):
        raise ConfigError(
            f"{name}: {every}: no layer is a gated delta net then; change it, or remove it and "
            "model.transformer.experimental_attention_variant"
        )


def _check_sizes(model: ModelConfig, config: TransformerConfig) -> None:
    """What Megatron would only find, by an assertion, when it builds the layers."""
    tensor = config.tensor_model_parallel_size
    groups = config.num_query_groups

    def refuse(key: str, what: str) -> typing.NoReturn:
        raise ConfigError(f"model.transformer.{key}: {getattr(config, key)} {what}")

    if config.num_attention_heads % groups:
        refuse(
            "num_query_groups", f"does not divide num_attention_heads: {config.num_attention_heads}"
        )
    if groups % tensor:
        refuse("num_query_groups", f"does not divide by tensor_model_parallel_size: {tensor}")
    if config.ffn_hidden_size % tensor:
        refuse("ffn_hidden_size", f"does not divide by tensor_model_parallel_size: {tensor}")
    if model.position_embedding_type in ("rope", "mrope", "yarn"):
        key, what = "kv_channels", "(the size of a head)"
        if config.multi_latent_attention:
            key, what = "qk_pos_emb_head_dim", "(the part of a head that has positions)"
        rotated = int(getattr(config, key) * model.rotary_percent)
        if rotated < 2 or rotated % 2:
            refuse(
                key,
                f"{what} times rotary_percent: {model.rotary_percent} gives "
                f"{rotated} rotated channels; it must be an even number of at least 2",
            )
    if config.normalization not in ("LayerNorm", "RMSNorm"):
        refuse("normalization", "is none that GPTModel has; choose LayerNorm or RMSNorm")
    if config.num_moe_experts is not None:
        if config.num_moe_experts % config.expert_model_parallel_size:
            refuse(
                "num_moe_experts",
                f"does not divide by expert_model_parallel_size: "
                f"{config.expert_model_parallel_size}",
            )
        split = config.expert_tensor_parallel_size
        if config.use_cpu_initialization and split > 1 and config.expert_model_parallel_size > 1:
            raise ConfigError(
                f"parallel.expert_tensor_parallel_size: {split} with expert_model_parallel_size: "
                f"{config.expert_model_parallel_size} gathers pieces of unequal sizes, which the "
                "CPU's process groups (gloo) cannot; set it to 1 or null"
            )
        if config.moe_ffn_hidden_size % split:
            refuse(
                "moe_ffn_hidden_size", f"does not divide by expert_tensor_parallel_size: {split}"
            )
        if config.moe_router_topk > config.num_moe_experts:
            refuse("moe_router_topk", f"exceeds num_moe_experts: {config.num_moe_experts}")
        frequency = config.moe_layer_freq
        if isinstance(frequency, list) and len(frequency) != config.num_layers:
            refuse("moe_layer_freq", f"needs one entry for each of {config.num_layers} layers")
