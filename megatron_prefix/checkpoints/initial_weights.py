"""Weights to start from fit the model, or are refused by name before anything is trained.

Megatron's loader takes what the model asks for and passes over the rest, and an embedding may
differ in its rows (vocabulary padding). So a checkpoint of another model could load without a word:
biases dropped, half a vocabulary zero. And a rotary base is no weight at all. All of this is
compared here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from torch.distributed.checkpoint.metadata import Metadata

from megatron_prefix.checkpoints.finding import find_checkpoint
from megatron_prefix.checkpoints.torch_dist import contents, read_metadata
from megatron_prefix.config import ModelConfig
from megatron_prefix.config.loader import load_dataclass, read_yaml
from megatron_prefix.distributed.rank_results import raise_together
from megatron_prefix.layout.hybrid_pattern import layers_of
from megatron_prefix.model.build import ModelChunks
from megatron_prefix.model.parameter_shards import ParameterShard, parameter_shards

MODEL_SECTION = "model.yaml"
"""Beside a checkpoint: the `model` section of a run that fits it."""
_OF_A_RUN = "trainer.json"
"""In a run's checkpoint: the trainer's state, with the configuration of the run."""

_NORMS = (
    ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    ("self_attention.linear_q_up_proj.layer_norm_weight", "self_attention.q_layernorm.weight"),
    ("self_attention.linear_kv_up_proj.layer_norm_weight", "self_attention.kv_layernorm.weight"),
)
"""Norms that the local spec and Transformer Engine's store under different names: before experts,
and of the latents of multi-latent attention."""

OF_EXECUTION = frozenset(
    {
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
        "moe_router_bias_update_rate",
        "moe_router_dtype",
        "moe_router_fusion",
        "moe_router_load_balancing_type",
        "moe_shared_expert_overlap",
        "moe_token_dispatcher_type",
        "moe_z_loss_coeff",
        "mtp_loss_scaling_factor",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "overlap_p2p_comm",
        "persist_layer_norm",
        "pipeline_model_parallel_layout",
    }
)
"""Of `model.transformer`: how a model runs and learns. A run may choose them, whatever the weights
were made for."""
_FREE = {"max_sequence_length", "make_vocab_size_divisible_by", "transformer"}


def recorded_model(checkpoint: Path) -> ModelConfig | None:
    """The model that a checkpoint says it holds: a converted one, or a run's.

    Raises:
        ValueError: it says so in a form that cannot be read.
    """
    file = _record(checkpoint)
    if file is None:
        return None
    return _load(file, _config_of_run if file.name == _OF_A_RUN else read_yaml)


def _record(checkpoint: Path) -> Path | None:
    """The file that says what model a checkpoint holds: of a conversion, or else of its run."""
    candidates = (
        checkpoint / MODEL_SECTION,
        checkpoint.parent / MODEL_SECTION,
        checkpoint / _OF_A_RUN,
    )
    return next((path for path in candidates if path.exists()), None)


def _config_of_run(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")).get("config", {})


def _load(path: Path, read: Callable[[Path], dict[str, Any]]) -> ModelConfig | None:
    try:
        values = read(path)
        if "model" not in values:
            return None
        return load_dataclass(ModelConfig, values["model"], path="model")
    except (ValueError, OSError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def check_initial_weights(path: Path, model: ModelConfig, chunks: ModelChunks) -> None:
    """Compare a checkpoint with the model that is to start from it, or go on. Collective.

    Args:
        path: a checkpoint, or a folder of them whose newest is taken.

    Raises:
        ValueError: an option that differs from what is recorded beside the checkpoint, or a
            tensor that is missing, of another shape, or would be left out; named.
    """
    wanted = {shard.key: shard for shard in parameter_shards(chunks)}
    keys: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(keys, set(wanted))
    with raise_together():
        checkpoint = find_checkpoint(path)
        file = _record(checkpoint)
        if file is not None and (recorded := recorded_model(checkpoint)) is not None:
            _compare_options(file, recorded, model, chunks)
        metadata = read_metadata(checkpoint)
        _compare_shapes(checkpoint, metadata, wanted, model)
        _compare_keys(checkpoint, metadata, set().union(*keys))


def use_stored_names(state: dict[str, Any], checkpoint: Path) -> None:
    """Let a model's sharded state ask for norms by the checkpoint's names."""
    stored = contents(read_metadata(checkpoint)).tensors
    for item in nested_values(state):
        key = getattr(item, "key", None)
        if isinstance(key, str) and key not in stored and (other := _other_name(key)) in stored:
            item.key = other


def _other_name(key: str) -> str | None:
    for pair in _NORMS:
        for name, other in (pair, pair[::-1]):
            if key.endswith(name):
                return key.removesuffix(name) + other
    return None


def _compare_options(
    file: Path, recorded: ModelConfig, model: ModelConfig, chunks: ModelChunks
) -> None:
    pairs = {
        f"model.{field.name}": (getattr(recorded, field.name), getattr(model, field.name))
        for field in dataclasses.fields(ModelConfig)
        if field.name not in _FREE
    }
    # Where stages begin is the layout's, which weights do not depend on.
    pairs["model.hybrid_layer_pattern"] = (
        recorded.hybrid_layer_pattern and layers_of(recorded.hybrid_layer_pattern),
        model.hybrid_layer_pattern and layers_of(model.hybrid_layer_pattern),
    )
    if not recorded.rope_scaling and not model.rope_scaling:
        del pairs["model.rope_scaling_factor"]
    for key, theirs in recorded.transformer.items():
        # Megatron puts numbers in place of some nulls, so what is written alike is alike.
        if key not in OF_EXECUTION and theirs != model.transformer.get(key):
            pairs[f"model.transformer.{key}"] = (theirs, getattr(chunks.config, key, None))
    for name, (theirs, ours) in pairs.items():
        if _as_written(theirs) != _as_written(ours):
            raise ValueError(
                f"{name}: {ours!r}, but the weights to start from were made for {theirs!r} "
                f"({file}); set it so, or change that file if the difference is meant"
            )


def _as_written(value: Any) -> Any:
    """A value as a file of YAML holds it: a tuple is written as a list."""
    return list(value) if isinstance(value, tuple) else value


def _compare_shapes(
    checkpoint: Path, metadata: Metadata, wanted: dict[str, ParameterShard], model: ModelConfig
) -> None:
    stored = contents(metadata).tensors
    for key, shard in wanted.items():
        entry = stored.get(key) or stored.get(_other_name(key) or "")
        if entry is None:
            hint = ""
            if key.startswith("mtp."):
                hint = "; convert them with --mtp, or set model.transformer.mtp_num_layers: null"
            raise ValueError(f"{checkpoint}: has no tensor {key}, which the model needs{hint}")
        found, needed = tuple(entry.size), shard.global_shape
        fits = found == needed
        if shard.may_be_padded:
            # Rows beyond the vocabulary are padding, as many as a layout asked for.
            fits = found[1:] == needed[1:] and found[0] >= model.vocab_size
        if not fits:
            raise ValueError(
                f"{checkpoint}: {key} has shape {list(found)}, the model needs {list(needed)}; the "
                "checkpoint is another model's, so correct the model section"
            )


def _compare_keys(checkpoint: Path, metadata: Metadata, wanted: set[str]) -> None:
    extra = [
        key
        for key in contents(metadata).tensors
        if key not in wanted and _other_name(key) not in wanted
    ]
    if extra:
        shown = ", ".join(sorted(extra)[:3]) + (" ..." if len(extra) > 3 else "")
        raise ValueError(
            f"{checkpoint}: holds {shown}, for which the model has no place; the checkpoint is "
            "another model's, so correct the model section"
        )
