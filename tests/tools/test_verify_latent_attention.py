"""The proof of models like DeepSeek-V3: multi-latent attention with YaRN, experts by groups."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from megatron_prefix.config import ModelConfig, ParallelConfig, YarnConfig
from tests.megatron.models import HAS_YARN
from tests.tools.proofs import ALWAYS, SHAPES, assert_exact, tool

__all__ = ["tool"]

DEEPSEEK: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "gated_linear_unit": True,
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "q_lora_rank": 20,
    "kv_lora_rank": 14,
    "qk_head_dim": 10,
    "qk_pos_emb_head_dim": 6,
    "v_head_dim": 12,
    "moe_layer_freq": [0, 1],
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "moe_router_score_function": "sigmoid",
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.0,
}
YARN = {
    "position_embedding_type": "yarn",
    "yarn": YarnConfig(
        rotary_scaling_factor=4.0,
        original_max_position_embeddings=16,
        mscale=1.0,
        mscale_all_dim=0.7,
    ),
}


@pytest.mark.parametrize(
    ("parallel", "recompute"),
    [
        (ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), "full"),
        (ParallelConfig(context_parallel_size=2), "none"),
        (ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2), "selective"),
    ],
    ids=["tensor and pipeline parallel", "latents travel", "keys and values travel"],
)
def test_multi_latent_attention_with_experts_by_groups(
    tool: ModuleType, parallel: ParallelConfig, recompute: str
) -> None:
    model = ModelConfig(
        vocab_size=93, max_sequence_length=64, transformer=DEEPSEEK, **(YARN if HAS_YARN else {})
    )
    report = tool.verify(
        model=model,
        shapes=SHAPES,
        parallel=parallel,
        recompute=recompute,
        optimizer_steps=2,
        packing=ALWAYS,
    )
    assert_exact(tool, report)
