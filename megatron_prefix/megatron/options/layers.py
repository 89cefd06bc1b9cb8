"""Options of the layers around attention: sizes, norms, activations, initial weights."""

from __future__ import annotations

from typing import Any

from megatron_prefix.attention.layer_kinds import hybrid_pattern
from megatron_prefix.megatron.auxiliary_losses import auxiliary_losses
from megatron_prefix.megatron.gated_delta_net import delta_net_layers
from megatron_prefix.megatron.options.record import (
    Option,
    Reason,
    harmless,
    is_set,
    refused,
    set_to,
    used,
)
from megatron_prefix.megatron.prediction_layers import prediction_layer_numbers

_BY_ROW = "Megatron's layers compute it, row by row"
_INITIAL = "it says where weights begin, not what is computed with them"

MARK_OF_PREDICTING_MODELS = "built_by_prefix_gpt_model"
"""Attribute that a config has whose model is built so; Megatron's own GPTModel rolls labels."""


def _predictions(value: Any, config: Any) -> Reason | None:
    """Why a model that predicts further tokens cannot share prefixes."""
    if not value:
        return None
    without = set_to("mtp_num_layers", None)
    if not hasattr(config, "mtp_standalone"):
        return Reason(
            why="megatron-core before 0.16 has another model around these layers",
            instead=f"Install 0.16 or newer, or {without[0].lower()}{without[1:]}",
        )
    if not getattr(config, MARK_OF_PREDICTING_MODELS, False):
        return Reason(
            why="Megatron's GPTModel rolls labels over the borders of segments",
            instead="Build prefix_gpt_model(GPTModel), with prefix_grouped(mtp_block_spec), or "
            f"{without[0].lower()}{without[1:]}",
        )
    layout = getattr(config, "pipeline_model_parallel_layout", None)
    if layout:
        return Reason(
            why="these layers have to be on the last stage",
            instead=without,
            beside=f"pipeline_model_parallel_layout={layout!r}",
        )
    if any(delta_net_layers(config)[-1:]):
        return Reason(
            why="these layers are as the model's last one, and a gated delta net has not been seen "
            "right there",
            instead=f"Let the last layer attend, or {without[0].lower()}{without[1:]}",
            beside=f"linear_attention_freq={config.linear_attention_freq!r}",
        )
    if getattr(config, "mtp_use_repeated_layer", False) and "global_aux_loss" in auxiliary_losses(
        config
    ):
        return Reason(
            why="the loss has a mean of counts so far, and recompute turns the order round in "
            "which the one layer runs the depths",
            instead="Set moe_router_load_balancing_type to aux_loss, or mtp_use_repeated_layer to "
            "False",
            beside="mtp_use_repeated_layer=True and moe_router_load_balancing_type="
            f"{config.moe_router_load_balancing_type!r}",
        )
    last = max(prediction_layer_numbers(config))
    for name in ("window_attn_skip_freq", "no_rope_freq", "cp_comm_type"):
        of_layers = getattr(config, name, None)
        if isinstance(of_layers, list) and last > config.num_layers:
            return Reason(
                why=f"Megatron takes these layers for layer {last} and the like, and the list ends "
                f"at layer {config.num_layers}",
                instead=without,
                beside=f"{name}={of_layers!r}",
            )
    return None


def _hybrid(value: Any, config: Any) -> Reason | None:
    """Why a model of layers of several kinds cannot share prefixes."""
    if not value or hybrid_pattern(config) is not None:
        return None
    return Reason(
        why="its layers go by a pattern that the config does not say, and a model whose last layer "
        "has no attention is trimmed elsewhere",
        instead="Build prefix_hybrid_model(HybridModel), with prefix_grouped(hybrid_stack_spec) "
        "(megatron-core 0.18 or newer), or set is_hybrid_model to False",
    )


OPTIONS: list[Option] = [
    *used("num_layers", why="which layer is the last one, and can be trimmed, goes by it"),
    *used(
        "hidden_size",
        "ffn_hidden_size",
        "fp32_residual_connection",
        "layernorm_epsilon",
        "add_bias_linear",
        "gated_linear_unit",
        "activation_func",
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "heterogeneous_block_specs",
        why=_BY_ROW,
    ),
    *used("glu_linear_offset", "activation_func_clamp_value", why=_BY_ROW, first="0.15"),
    *used("use_te_activation_func", why=_BY_ROW, first="0.15"),
    *used("fused_residual_rmsnorm", why=_BY_ROW, first="0.17"),
    *used(
        "use_transformer_engine_op_fuser",
        "use_grouped_gemm_for_dense_mlp",
        why=_BY_ROW,
        first="0.18",
    ),
    *used(
        "normalization",
        "persist_layer_norm",
        "layernorm_zero_centered_gamma",
        "memory_efficient_layer_norm",
        why="Transformer Engine's and Apex's norms honour it; torch's, which stands in where these "
        "cannot run, refuses what it does not have",
    ),
    *harmless("apply_residual_connection_post_layernorm", why="no release reads it"),
    *used("clone_scatter_output_in_embedding", why="it is about the embedding's memory"),
    *used(
        "cross_entropy_loss_fusion",
        "cross_entropy_fusion_impl",
        why="Megatron's loss computes it, label by label; the log-probability head has its own",
    ),
    *refused(
        "use_mup",
        when=is_set,
        why="Megatron multiplies logits by mup_output_mult behind the output layer, where "
        "log-probabilities are made already",
        instead=False,
        first="0.17",
    ),
    *harmless(
        "mup_width_mult",
        "mup_base_hidden_size",
        "mup_embedding_mult",
        "mup_output_mult",
        "mup_base_head_dim",
        "mup_attn_scale_power",
        why="only use_mup reads it, which is refused",
        first="0.17",
    ),
    # Initial weights.
    *used(
        "use_cpu_initialization",
        why="weights begin on the CPU, and modules that need a GPU are not chosen",
    ),
    *harmless(
        "perform_initialization",
        "init_method",
        "output_layer_init_method",
        "init_method_std",
        "embedding_init_method",
        "embedding_init_method_std",
        "init_model_with_meta_device",
        why=_INITIAL,
    ),
    # Recompute.
    *used(
        "recompute_granularity",
        "recompute_method",
        "recompute_num_layers",
        "recompute_modules",
        "distribute_saved_activations",
        why="Megatron runs the same forward again, with the same params of the batch",
    ),
    # Other kinds of layers.
    *used(
        "is_hybrid_model",
        check=_hybrid,
        why="it scales first weights; layers that cannot share prefixes are refused by the pattern "
        "of a prefix_hybrid_model",
    ),
    *used(
        "mamba_state_dim",
        "mamba_head_dim",
        "mamba_num_groups",
        "mamba_num_heads",
        why="M in the pattern of a prefix_hybrid_model: our layer reads the sizes off Megatron's "
        "mixer",
    ),
    *harmless(
        "use_mamba_mem_eff_path",
        why="our layer keeps rows only for backward, and no states, whatever it says",
    ),
    *harmless(
        "mamba_training_ssm_states_dtype",
        why="states of our layer are in float32 or wider, whatever it says",
        first="0.19",
    ),
    *used(
        "linear_attention_freq",
        "linear_conv_kernel_dim",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
        why="experimental_attention_variant: our layer reads the sizes off Megatron's modules",
        first="0.16",
    ),
    *harmless(
        "dsa_indexer_n_heads",
        "dsa_indexer_head_dim",
        "dsa_indexer_topk",
        "dsa_indexer_loss_coeff",
        "dsa_indexer_use_sparse_loss",
        why="only experimental_attention_variant dsa reads it, which is refused",
        first="0.16",
    ),
    *harmless(
        "experimental_attention_variant_loss_scale_func",
        "dsa_indexer_topk_freq",
        "dsa_indexer_skip_topk_offset",
        "dsa_kernel_backend",
        "dsa_indexer_rope_interleaved",
        "dsa_indexer_rotate_activation",
        "dsa_indexer_scoring_relu",
        "dsa_indexer_k_norm_epsilon",
        "dsa_indexer_k_norm_fp32",
        why="only experimental_attention_variant dsa reads it, which is refused",
        first="0.19",
    ),
    # Multi-token prediction.
    *used(
        "mtp_num_layers",
        check=_predictions,
        why="a model of prefix_gpt_model runs each depth on the row of its shift",
    ),
    *refused(
        "mtp_hybrid_override_pattern",
        when=is_set,
        why="multi-token prediction rolls labels over the borders of segments",
        instead=None,
        first="0.17",
    ),
    *used("mtp_loss_scaling_factor", why="mtp_num_layers: a run multiplies the loss by it"),
    *refused(
        "mtp_standalone",
        when=is_set,
        why="MTP layers on a pipeline stage of their own are given no shifted rows",
        instead=False,
        first="0.16",
    ),
    *used(
        "mtp_use_repeated_layer",
        why="mtp_num_layers: every depth runs the one layer",
        first="0.17",
    ),
    *refused(
        "mtp_detach_heads",
        when=is_set,
        why="a run detaches predictions by training.detach_mtp, a model of your own by its "
        "attribute detach_predictions",
        instead=False,
        first="0.19",
    ),
]
