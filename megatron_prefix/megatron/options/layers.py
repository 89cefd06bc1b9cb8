"""Options of the layers around attention: sizes, norms, activations, initial weights."""

from __future__ import annotations

from megatron_prefix.megatron.options.record import Option, harmless, is_set, refused, used

_BY_ROW = "Megatron's layers compute it, row by row"
_INITIAL = "it says where weights begin, not what is computed with them"

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
    *refused(
        "is_hybrid_model",
        when=is_set,
        why="state-space layers would run through a packed row as if it were one sequence, and "
        "a model whose last layer has no attention cannot be trimmed",
        instead=False,
    ),
    *harmless(
        "mamba_state_dim",
        "mamba_head_dim",
        "mamba_num_groups",
        "mamba_num_heads",
        "use_mamba_mem_eff_path",
        why="only state-space layers read it, which are refused",
    ),
    *harmless(
        "mamba_training_ssm_states_dtype",
        why="only state-space layers read it, which are refused",
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
    *refused(
        "mtp_num_layers",
        when=lambda value: value is not None and value > 0,
        why="multi-token prediction rolls labels over the borders of segments",
        instead=None,
    ),
    *refused(
        "mtp_hybrid_override_pattern",
        when=is_set,
        why="multi-token prediction rolls labels over the borders of segments",
        instead=None,
        first="0.17",
    ),
    *harmless("mtp_loss_scaling_factor", why="only mtp_num_layers reads it, which is refused"),
    *harmless("mtp_standalone", why="only mtp_num_layers reads it, which is refused", first="0.16"),
    *harmless(
        "mtp_use_repeated_layer", why="only mtp_num_layers reads it, which is refused", first="0.17"
    ),
    *harmless(
        "mtp_detach_heads", why="only mtp_num_layers reads it, which is refused", first="0.19"
    ),
]
