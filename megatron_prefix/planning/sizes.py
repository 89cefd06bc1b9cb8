"""What the prediction of a run depends on, from its configs: its model, process groups, stages."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prefix.attention.layer_kinds import hybrid_pattern
from megatron_prefix.config import (
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    TrainingConfig,
)
from megatron_prefix.config.loader import ConfigError
from megatron_prefix.layout.hybrid_pattern import stages_of
from megatron_prefix.megatron.moe_layers import moe_layers
from megatron_prefix.megatron.releases import gate_has_offset, option
from megatron_prefix.model.build import model_shape
from megatron_prefix.planning.memory import MemoryModel
from megatron_prefix.planning.rank_sizes import RankSizes


def memory_model(
    model: ModelConfig, config: TransformerConfig, training: TrainingConfig
) -> MemoryModel:
    """What memory depends on; on the GPU, Megatron's fused operations are taken to be there."""
    fused = training.device != "cpu"
    rotary = model.position_embedding_type in ("rope", "mrope", "yarn")
    shape = model_shape(model, config)
    return MemoryModel(
        shape=shape,
        moe_layers=moe_layers(config),
        padded_vocab_size=model.padded_vocab_size(config.tensor_model_parallel_size),
        tied_embeddings=model.share_embeddings_and_output_weights,
        learned_positions=(
            model.max_sequence_length if model.position_embedding_type == "learned_absolute" else 0
        ),
        rotary_channels=int(config.kv_channels * model.rotary_percent) if rotary else 0,
        rms_norm=config.normalization == "RMSNorm",
        qk_norm=config.qk_layernorm,
        qk_norm_all_heads=model.qk_norm_all_heads,
        qkv_bias=config.add_qkv_bias,
        linear_bias=config.add_bias_linear,
        sinks=option(config, "softmax_type") == "learnable",
        shared_expert_gate=bool(option(config, "moe_shared_expert_gate")),
        mlp_widths=_mlp_widths(model.activation, config, fused=fused),
        fused=fused,
        dtype=training.dtype,
        recompute=training.recompute,
        trim_last_layer=training.trim_last_layer and not shape.whole_last_layer,
        detached_predictions=training.detach_mtp,
        head_chunk_tokens=training.log_prob_chunk_tokens,
    )


def _mlp_widths(activation: str, config: TransformerConfig, *, fused: bool) -> int:
    if not config.gated_linear_unit:
        # relu keeps its output, which the second product keeps too.
        return 1 if config.activation_func is F.relu else 2
    if fused and config.bias_activation_fusion and activation in ("silu", "quick_gelu"):
        return 3
    # Both halves, the activated one, the product; and the other half plus an offset.
    widths = 4 + gate_has_offset()
    if activation == "quick_gelu":
        widths += 1  # the sigmoid
    # The half that is clamped before it is activated.
    return widths + (option(config, "activation_func_clamp_value") is not None)


def rank_sizes(
    parallel: ParallelConfig, optimizer: OptimizerSettings, *, data_parallel_size: int
) -> RankSizes:
    """The sizes of a run's process groups."""
    return RankSizes(
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        chunks=parallel.num_model_chunks,
        context=parallel.context_parallel_size,
        data=data_parallel_size,
        expert=parallel.expert_model_parallel_size,
        expert_tensor=parallel.expert_split,
        sequence_parallel=parallel.uses_sequence_parallel,
        distributed_optimizer=optimizer.use_distributed_optimizer,
    )


def stage_layers(config: TransformerConfig) -> list[list[list[int]]]:
    """[pipeline rank][chunk] the layers, from 0, as Megatron distributes them.

    Those of multi-token prediction, one for each depth, are numbered on behind the others.

    Raises:
        ConfigError: an uneven distribution that is not counted here.
    """
    for name in (
        "pipeline_model_parallel_layout",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
    ):
        if option(config, name):
            raise ConfigError(
                f"model.transformer.{name}: {option(config, name)} is not planned for; leave "
                "it out to plan with equal stages"
            )
    ranks = config.pipeline_model_parallel_size
    chunks = config.virtual_pipeline_model_parallel_size or 1
    if (pattern := hybrid_pattern(config)) is not None:
        sizes = [len(stage) for stage in stages_of(pattern)]
    else:
        sizes = [config.num_layers // (ranks * chunks)] * (ranks * chunks)
    ends = list(itertools.accumulate(sizes))
    stages = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    depths = config.mtp_num_layers or 0
    stages[-1] += range(config.num_layers, config.num_layers + depths)
    return [stages[rank::ranks] for rank in range(ranks)]
