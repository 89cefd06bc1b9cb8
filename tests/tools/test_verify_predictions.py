"""`verify_equivalence.py` of models with multi-token prediction, against Megatron's own."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prefix.config import ParallelConfig
from tests.megatron.models import HAS_PREDICTIONS, HYBRID
from tests.tools.proofs import ALWAYS, assert_exact, small_model, tool

__all__ = ["tool"]

pytestmark = pytest.mark.skipif(
    not HAS_PREDICTIONS, reason="megatron-core before 0.16 has another model"
)

# Three levels of sharing; responses shorter than the depth, prompts longer.
SHAPES = [
    {"prefix": 11, "responses": [3, 7, 1, 5]},
    {"system": 6, "prefix": 7, "responses": [2, 9]},
    {"system": 6, "prefix": 4, "responses": [1, 3]},
]
# As GLM-4.5 and DeepSeek-V3 have them, with every loss of routers that there is.
EXPERTS = {
    "num_moe_experts": 4,
    "moe_layer_freq": [0, 1],
    "moe_ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 16,
    "moe_router_topk": 2,
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 1e-2,
    "moe_router_load_balancing_type": ["seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [2e-2, 3e-2],
    "moe_z_loss_coeff": 1e-2,
}
LATENT = {
    "add_qkv_bias": False,
    "num_query_groups": 8,
    "multi_latent_attention": True,
    "kv_lora_rank": 14,
    "qk_head_dim": 10,
    "qk_pos_emb_head_dim": 6,
    "v_head_dim": 12,
}
GATED_DELTA_NETS = {
    **HYBRID,
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 24,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 2e-2,
    "moe_z_loss_coeff": 1e-2,
}
WINDOWS = {
    "num_layers": 3,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "mrope_section": [1, 2, 1],
    "window_size": [4, 0],
    "window_attn_skip_freq": 2,
}
if hasattr(TransformerConfig, "mtp_use_repeated_layer"):
    # Before 0.17 Megatron looks for these layers behind the end of the list.
    WINDOWS["cp_comm_type"] = ["p2p", "a2a", "all_gather"]
    GATED_DELTA_NETS["mtp_use_repeated_layer"] = True


@pytest.mark.parametrize(
    ("parallel", "depths", "transformer"),
    [
        (
            ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
            3,
            EXPERTS,
        ),
        (ParallelConfig(context_parallel_size=2), 3, {}),
        (ParallelConfig(context_parallel_size=2), 2, {**LATENT, **EXPERTS}),
        (ParallelConfig(tensor_model_parallel_size=2), 2, GATED_DELTA_NETS),
        (ParallelConfig(context_parallel_size=2), 3, WINDOWS),
    ],
    ids=[
        "experts, tensor and pipeline parallel",
        "dense, context parallel",
        "latent with experts, context parallel",
        "gated delta nets, tensor parallel",
        "mRoPE and windows, context parallel",
    ],
)
def test_multi_token_prediction_is_that_of_whole_sequences(
    tool: ModuleType, parallel: ParallelConfig, depths: int, transformer: dict[str, Any]
) -> None:
    options = {"num_layers": 2, "mtp_num_layers": depths, "mtp_loss_scaling_factor": 0.7}
    model = small_model(tool, **options | transformer)
    if "mrope_section" in transformer:
        model = dataclasses.replace(model, position_embedding_type="mrope")
    report = tool.verify(
        model=model,
        shapes=SHAPES,
        parallel=parallel,
        recompute="full",
        packing={**ALWAYS, "sharing": "everything"},
        optimizer_steps=2 if "moe_z_loss_coeff" in transformer else 1,
    )
    assert_exact(tool, report)
