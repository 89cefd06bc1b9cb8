"""The model of a run: Megatron's own classes, our layer spec, our log-probability head."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prefix.attention.layer_kinds import (
    MAMBA_CONVOLUTION_WIDTH,
    hybrid_layers,
    hybrid_pattern,
)
from megatron_prefix.attention.row_attention import head_dim
from megatron_prefix.attention.windows import layer_window, model_window, windowed_layers
from megatron_prefix.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_prefix.layer_spec import prefix_grouped
from megatron_prefix.layers.all_heads_norm import norm_over_all_heads
from megatron_prefix.layers.predicting_model import prefix_gpt_model
from megatron_prefix.layers.router import has_statistics
from megatron_prefix.layout import (
    DeltaNetShape,
    LatentShape,
    MambaShape,
    ModelShape,
    RecurrentShape,
)
from megatron_prefix.layout.hybrid_pattern import (
    ATTENTION,
    GATED_DELTA_NET,
    MAMBA,
    layers_of,
    num_trimmed,
    stages_of,
)
from megatron_prefix.layout.layer_shapes import PredictionShape
from megatron_prefix.layout.recurrence import CHUNK_TOKENS
from megatron_prefix.megatron.expert_biases import let_experts_have_biases
from megatron_prefix.megatron.gated_delta_net import delta_net_layers, hybrid_block_spec
from megatron_prefix.megatron.latent_attention import complete_local_spec
from megatron_prefix.megatron.mamba import mamba_heads
from megatron_prefix.megatron.moe_layers import moe_layers
from megatron_prefix.megatron.prediction_layers import prediction_layer_numbers
from megatron_prefix.megatron.releases import have_transformer_engine, option
from megatron_prefix.model.head import LogProbHead
from megatron_prefix.model.hybrid import build_hybrid_model
from megatron_prefix.model.transformer_config import transformer_config


def build_model(
    model: ModelConfig,
    config: TransformerConfig,
    *,
    vp_stage: int | None = None,
    shared_prefixes: bool = True,
) -> LanguageModule:
    """This rank's GPTModel or HybridModel (chunk); see `build_gpt_model` for the arguments."""
    if model.hybrid_layer_pattern is None:
        return build_gpt_model(model, config, vp_stage=vp_stage, shared_prefixes=shared_prefixes)
    return build_hybrid_model(
        model,
        config,
        use_transformer_engine=use_transformer_engine(config),
        vp_stage=vp_stage,
        shared_prefixes=shared_prefixes,
    )


def build_gpt_model(
    model: ModelConfig,
    config: TransformerConfig,
    *,
    vp_stage: int | None = None,
    shared_prefixes: bool = True,
) -> GPTModel:
    """This rank's GPTModel (chunk) in the current parallel state.

    With `mtp_num_layers` and shared prefixes it is a `prefix_gpt_model`.

    Args:
        vp_stage: the chunk's index under interleaved pipelining.
        shared_prefixes: False builds Megatron's unmodified model.
    """
    # Releases before 0.15 know no vp_stage in is_pipeline_*_stage's signature order; by name only.
    stage = {} if vp_stage is None else {"vp_stage": vp_stage}
    pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, **stage)
    post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, **stage)
    transformer_engine = use_transformer_engine(config)
    make_spec = hybrid_block_spec if any(delta_net_layers(config)) else get_gpt_decoder_block_spec
    spec = make_spec(config, use_transformer_engine=transformer_engine, vp_stage=vp_stage)
    if model.qk_norm_all_heads:
        norm_over_all_heads(spec)
    predictions = None
    if config.mtp_num_layers:
        predictions = get_gpt_mtp_block_spec(
            config, spec, use_transformer_engine=transformer_engine, vp_stage=vp_stage
        )
    if shared_prefixes:
        spec = prefix_grouped(spec)
        predictions = predictions and prefix_grouped(predictions)
    elif config.multi_latent_attention:
        complete_local_spec(spec)
    with_predictions = shared_prefixes and config.mtp_num_layers
    built = (prefix_gpt_model() if with_predictions else GPTModel)(
        config=config,
        transformer_layer_spec=spec,
        mtp_block_spec=predictions,
        vocab_size=model.padded_vocab_size(config.tensor_model_parallel_size),
        max_sequence_length=model.max_sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        # Multi-latent attention rotates by itself.
        position_embedding_type=(
            "rope" if config.multi_latent_attention else model.position_embedding_type
        ),
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        rope_scaling=model.rope_scaling,
        rope_scaling_factor=model.rope_scaling_factor,
        vp_stage=vp_stage,
    )
    let_experts_have_biases(built)
    return built


class HasVocabulary(Protocol):
    """A `ModelConfig`, or a GPTModel."""

    vocab_size: int


def model_shape(model: HasVocabulary, config: TransformerConfig) -> ModelShape:
    """The sizes that the cost model counts FLOPs by."""
    of_kind: dict[str, Any] = {}
    if config.num_moe_experts is not None:
        of_kind = {
            "num_moe_layers": sum(moe_layers(config)),
            "num_experts": config.num_moe_experts,
            "num_experts_per_token": config.moe_router_topk,
            "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
            "moe_shared_expert_ffn_hidden_size": config.moe_shared_expert_intermediate_size or 0,
            "whole_last_layer": moe_layers(config)[-1] and has_statistics(config),
        }
    if config.mtp_num_layers:
        of_kind |= {"whole_last_layer": True, "predictions": _prediction_shape(config)}
    recurrent = _recurrent_layers(config)
    windowed = windowed_layers(config)
    if any(recurrent):
        windowed = tuple(w and r is None for w, r in zip(windowed, recurrent, strict=True))
    return ModelShape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=head_dim(config),
        vocab_size=model.vocab_size,
        gated_linear_unit=config.gated_linear_unit,
        windowed_layers=windowed,
        window=model_window(config) or 0,
        latent=_latent_shape(config),
        recurrent_layers=recurrent,
        **(of_kind | _of_hybrid(config)),
    )


def _of_hybrid(config: TransformerConfig) -> dict[str, Any]:
    pattern = hybrid_pattern(config)
    if pattern is None:
        return {}
    trimmed = num_trimmed(stages_of(pattern)[-1], experts_collect=has_statistics(config))
    return {
        "kinds": layers_of(pattern),
        "num_trimmed_layers": trimmed,
        "whole_last_layer": trimmed == 0,
    }


def _latent_shape(config: TransformerConfig) -> LatentShape | None:
    if not config.multi_latent_attention:
        return None
    return LatentShape(
        query_rank=config.q_lora_rank or 0,
        rank=config.kv_lora_rank,
        shared_channels=config.qk_pos_emb_head_dim,
        value_channels=config.v_head_dim,
    )


def _prediction_shape(config: TransformerConfig) -> PredictionShape:
    repeated = bool(option(config, "mtp_use_repeated_layer"))
    numbers = prediction_layer_numbers(config)
    windowed = tuple(layer_window(config, number) is not None for number in numbers)
    return PredictionShape(
        depths=config.mtp_num_layers,
        repeated=repeated,
        experts=moe_layers(config)[-1],
        windowed=windowed * (config.mtp_num_layers if repeated else 1),
    )


def _recurrent_layers(config: TransformerConfig) -> tuple[RecurrentShape | None, ...]:
    kinds = hybrid_layers(config) or "".join(
        GATED_DELTA_NET if is_one else ATTENTION for is_one in delta_net_layers(config)
    )
    make = {GATED_DELTA_NET: _delta_net_shape, MAMBA: _mamba_shape}
    shapes = {kind: make[kind](config) for kind in {*kinds} & make.keys()}
    return tuple(map(shapes.get, kinds)) if shapes else ()


def _mamba_shape(config: TransformerConfig) -> MambaShape:
    return MambaShape(
        num_heads=mamba_heads(config),
        num_groups=config.mamba_num_groups,
        head_channels=config.mamba_head_dim,
        state_channels=config.mamba_state_dim,
        width=MAMBA_CONVOLUTION_WIDTH,
        chunk_tokens=CHUNK_TOKENS,
    )


def _delta_net_shape(config: TransformerConfig) -> DeltaNetShape:
    return DeltaNetShape(
        num_key_heads=config.linear_num_key_heads,
        num_value_heads=config.linear_num_value_heads,
        key_channels=config.linear_key_head_dim,
        value_channels=config.linear_value_head_dim,
        width=config.linear_conv_kernel_dim,
        chunk_tokens=CHUNK_TOKENS,
    )


def use_transformer_engine(config: TransformerConfig) -> bool:
    """Transformer Engine's modules where they are installed and the model is not on the CPU."""
    return have_transformer_engine() and not config.use_cpu_initialization


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelChunks:
    """The chunks of the model on this rank: one, or one per virtual pipeline stage."""

    wrapped: list[torch.nn.Module]
    """In Megatron's DDP, as the schedules and optimizers take them."""
    bare: list[LanguageModule]
    config: TransformerConfig
    head: LogProbHead | None
    """The log-probability head, on the last pipeline stage."""

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Parameters of all chunks; names carry the chunk's index where there are several."""
        prefixes = [f"chunk{i}." if len(self.bare) > 1 else "" for i in range(len(self.bare))]
        return [
            (prefix + name, parameter)
            for prefix, chunk in zip(prefixes, self.bare, strict=True)
            for name, parameter in chunk.named_parameters()
        ]

    def expert_biases(self) -> list[torch.Tensor]:
        """The biases by which routers choose experts: weights too, though they are buffers."""
        routers = (m for chunk in self.bare for m in chunk.modules() if isinstance(m, TopKRouter))
        return [router.expert_bias for router in routers if router.expert_bias is not None]


def build_model_chunks(
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    *,
    use_distributed_optimizer: bool,
) -> ModelChunks:
    """Build, place and wrap this rank's model chunks for training."""
    config = transformer_config(model, parallel, training)
    stages = range(parallel.num_model_chunks) if parallel.num_model_chunks > 1 else [None]
    bare = [build_model(model, config, vp_stage=stage) for stage in stages]
    for chunk in bare:
        if training.device == "cuda":
            chunk.cuda(torch.cuda.current_device())
    if config.mtp_num_layers:
        bare[-1].detach_predictions = training.detach_mtp
    head = LogProbHead.of(
        bare[-1],
        vocab_size=model.vocab_size,
        chunk_tokens=training.log_prob_chunk_tokens,
        wide_products=training.head_dtype == "float32",
    )
    inner = [Float16Module(config, c) if config.bf16 else c for c in bare]
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=use_distributed_optimizer,
        grad_reduce_in_fp32=config.bf16,
        overlap_grad_reduce=False,
        check_for_nan_in_grad=False,
    )
    wrapped = [
        DistributedDataParallel(config, ddp_config, c, disable_bucketing=i > 0)
        for i, c in enumerate(inner)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    return ModelChunks(wrapped=wrapped, bare=bare, config=config, head=head)
