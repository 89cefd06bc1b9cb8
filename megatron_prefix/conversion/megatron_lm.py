"""What Megatron-LM's own training reads of a checkpoint beside the weights."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_prefix.conversion.architecture import Architecture
from megatron_prefix.conversion.hf_qwen3_next import to_transformer


def common_state(a: Architecture) -> dict[str, Any]:
    """The contents of common.pt: plain values, which load with weights_only=True.

    Its arguments are there for Megatron-LM's checks and for its --use-checkpoint-args.
    """
    args = argparse.Namespace(
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        num_attention_heads=a.num_attention_heads,
        num_query_groups=a.num_query_groups,
        kv_channels=a.head_dim,
        ffn_hidden_size=a.ffn_hidden_size,
        max_position_embeddings=a.max_length,
        padded_vocab_size=a.vocab_size,
        untie_embeddings_and_output_weights=not a.tied_embeddings,
        add_position_embedding=False,
        add_bias_linear=a.linear_bias,
        add_qkv_bias=a.qkv_bias,
        qk_layernorm=a.qk_norm,
        swiglu=a.gate_limit is None,
        normalization="RMSNorm",
        norm_epsilon=a.norm_epsilon,
        position_embedding_type="rope" if a.yarn is None else "yarn",
        rotary_base=a.rotary_base,
        rotary_percent=a.rotary_fraction,
        use_rope_scaling=a.llama3_rope_factor is not None,
        rope_scaling_factor=a.llama3_rope_factor or 8.0,
        num_experts=a.num_experts,
        moe_ffn_hidden_size=a.expert_ffn_hidden_size,
        moe_router_topk=a.experts_per_token or 2,
        moe_router_pre_softmax=not a.normalized_routing,
        mtp_num_layers=a.computed_mtp_layers or None,
        apply_layernorm_1p=a.linear is not None,
        **to_transformer(a),
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
    )
    return {"args": args, "checkpoint_version": 3.0, "iteration": 0}
