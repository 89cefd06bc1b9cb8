"""Megatron's config of the model that a run's configuration describes, or why there can be none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions import fused_bias_geglu
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_prefix.attention.layer_kinds import set_hybrid_pattern
from megatron_prefix.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_prefix.config.loader import ConfigError
from megatron_prefix.megatron.comm_type_list import repair_comm_type_list
from megatron_prefix.megatron.options import UnsupportedOptionError, refuse_unsupported
from megatron_prefix.megatron.options.layers import MARK_OF_PREDICTING_MODELS
from megatron_prefix.megatron.recurrent_config import config_with_context_parallelism
from megatron_prefix.model.config_checks import check_config, check_sections
from megatron_prefix.model.hybrid import hybrid_options

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "squared_relu": lambda x: torch.pow(F.relu(x), 2),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}

_FUSIONS = (
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "gradient_accumulation_fusion",
    "persist_layer_norm",
    "apply_rope_fusion",
    "moe_permute_fusion",
)
"""Megatron's fused operations that need a GPU."""


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig
) -> TransformerConfig:
    """Megatron's config of the model.

    Raises:
        ConfigError: a key of `model.transformer` that Megatron does not know, of a wrong type, that
            another section decides, or whose combination Megatron or shared prefixes refuse.
    """
    of_pattern = hybrid_options(model)
    check_sections(model, parallel, of_pattern=of_pattern)
    options = _options(model, parallel, training, of_pattern)
    try:
        config = _build(model, options)
        refuse_unsupported(config)
        repair_comm_type_list(config)
    except UnsupportedOptionError as error:
        raise ConfigError(f"model.transformer: {error}") from error
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"model.transformer: Megatron-Core refuses it: {error}") from error
    check_config(model, parallel, training, config)
    return config


def _options(
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    of_pattern: dict[str, Any],
) -> dict[str, Any]:
    """Fields of Megatron's config, but for those of multi-latent attention's rotary embedding."""
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
        for fusion in _FUSIONS:
            options.setdefault(fusion, False)
    if training.recompute == "full":
        options.update(
            recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
        )
    elif training.recompute == "selective":
        options.update(recompute_granularity="selective", recompute_modules=["core_attn"])
    return options


def _build(model: ModelConfig, options: dict[str, Any]) -> TransformerConfig:
    """The config, with what Megatron and this package read off it beside its fields."""
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
    return config


def _activation(name: str, *, on_cpu: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    if name == "quick_gelu" and not on_cpu:
        # Megatron's fusions look for this very function, which torch compiles at its first call.
        return getattr(fused_bias_geglu, name, _ACTIVATIONS[name])
    return _ACTIVATIONS[name]


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
