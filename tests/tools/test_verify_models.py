"""Proofs of kinds of models: experts and their losses, sliding windows, mRoPE."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import pytest

from megatron_prefix.config import ParallelConfig, YarnConfig
from megatron_prefix.megatron.options.attention import params_have_cp_group
from megatron_prefix.megatron.releases import has_global_auxiliary_loss, replays_routes
from tests.megatron.models import HAS_WINDOWS
from tests.tools.proofs import (
    ALWAYS,
    SERIES,
    SHAPES,
    SHAPES_OF_RANKS,
    SHAPES_OVER_THE_BUDGET,
    assert_exact,
    small_model,
    tool,
)

__all__ = ["tool"]


@pytest.mark.parametrize(("tensor", "expert", "data"), [(1, 2, 2), (2, 1, 1), (2, 2, 1), (2, 2, 2)])
def test_experts_on_ranks(tool: ModuleType, tensor: int, expert: int, data: int) -> None:
    """Spread over ranks, split, and spread over ranks that split the other layers."""
    report = tool.verify(
        model=small_model(tool, num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24),
        shapes=SHAPES,
        parallel=ParallelConfig(
            tensor_model_parallel_size=tensor,
            expert_model_parallel_size=expert,
        ),
        data_parallel_size=data,
        packing=ALWAYS,
    )
    assert_exact(tool, report)


@pytest.mark.parametrize("rate", [0.0, 1e-3], ids=["frozen", "moving"])
@pytest.mark.parametrize(
    ("parallel", "data", "recompute"),
    [
        ({}, 1, "none"),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1, "none"),
        ({"context_parallel_size": 2, "expert_model_parallel_size": 2}, 1, "full"),
        ({"expert_model_parallel_size": 2}, 2, "none"),
    ],
)
def test_experts_that_a_bias_chooses(
    tool: ModuleType, parallel: dict[str, int], data: int, recompute: str, rate: float
) -> None:
    """Groups of experts, scaled scores and a shared expert, as DeepSeek-V3 has them; by a bias that
    stays as it is, and by one that follows the counts of three steps."""
    report = tool.verify(
        model=small_model(
            tool,
            num_moe_experts=8,
            moe_router_topk=2,
            moe_ffn_hidden_size=24,
            moe_shared_expert_intermediate_size=16,
            moe_router_score_function="sigmoid",
            moe_router_num_groups=4,
            moe_router_group_topk=2,
            moe_router_topk_scaling_factor=2.5,
            moe_router_enable_expert_bias=True,
            moe_router_bias_update_rate=rate,
        ),
        shapes=[*SHAPES, {"system": 7, "prefix": 3, "responses": [4, 9]}] * 2,
        parallel=ParallelConfig(**parallel),
        data_parallel_size=data,
        recompute=recompute,
        optimizer_steps=3,
        packing=ALWAYS,
    )
    assert_exact(tool, report)


EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
WHOLE_EXPERTS = ParallelConfig(
    tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1
)


@pytest.mark.skipif(not HAS_WINDOWS, reason="megatron-core 0.14, which refuses windows and sinks")
@pytest.mark.parametrize(
    ("keys", "transformer", "parallel", "recompute"),
    [
        pytest.param(
            5,
            {},
            ParallelConfig(context_parallel_size=2, tensor_model_parallel_size=2),
            "full",
            id="context and tensor parallelism, recompute",
        ),
        pytest.param(
            64,
            {},
            ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
            "none",
            id="interleaved pipeline",
        ),
        pytest.param(
            5,
            EXPERTS,
            ParallelConfig(context_parallel_size=2, expert_model_parallel_size=2),
            "none",
            id="context and expert parallelism",
        ),
    ],
)
def test_sliding_windows_on_every_other_layer_with_learnable_sinks(
    tool: ModuleType,
    keys: int,
    transformer: dict[str, Any],
    parallel: ParallelConfig,
    recompute: str,
) -> None:
    model = small_model(
        tool,
        window_size=[keys - 1, 0],
        window_attn_skip_freq=2,
        softmax_type="learnable",
        **transformer,
    )
    report = tool.verify(
        model=tool.with_comm_types(model, ["a2a", "a2a", "p2p", "p2p"]),
        shapes=SHAPES_OF_RANKS,
        parallel=parallel,
        recompute=recompute,
        packing={**ALWAYS, "sharing": "everything"},
        optimizer_steps=2,
    )
    assert_exact(tool, report)


def test_norms_over_all_heads_of_all_ranks(tool: ModuleType) -> None:
    """As MiniMax-M2 has them, with experts that sigmoid scores and a bias choose."""
    model = small_model(
        tool,
        num_layers=2,
        num_attention_heads=4,
        num_query_groups=2,
        qk_layernorm=True,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.0,
        **EXPERTS,
    )
    report = tool.verify(
        model=dataclasses.replace(model, qk_norm_all_heads=True, rotary_percent=0.5),
        shapes=SHAPES,
        parallel=WHOLE_EXPERTS,
        recompute="full",
        optimizer_steps=2,
        packing=ALWAYS,
    )
    assert_exact(tool, report)


@pytest.mark.skipif(not HAS_WINDOWS, reason="megatron-core 0.14, which refuses sinks")
def test_a_model_like_gpt_oss(tool: ModuleType) -> None:
    """Biases of all linear layers, of experts and of routers, which Megatron allows where no expert
    is split; a clamped quick GELU, windows, sinks and YaRN."""
    model = small_model(
        tool,
        num_layers=2,
        glu_linear_offset=1.0,
        activation_func_clamp_value=0.2,
        add_bias_linear=True,
        softmax_type="learnable",
        window_size=[4, 0],
        window_attn_skip_freq=[1, 0],
        **EXPERTS,
    )
    yarn = YarnConfig(
        rotary_scaling_factor=4.0,
        original_max_position_embeddings=32,
        correction_range_round_to_int=False,
    )
    report = tool.verify(
        model=dataclasses.replace(
            model, activation="quick_gelu", position_embedding_type="yarn", yarn=yarn
        ),
        shapes=SHAPES,
        parallel=WHOLE_EXPERTS,
        recompute="full",
        optimizer_steps=2,
        packing=ALWAYS,
    )
    assert_exact(tool, report)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
        ),
        pytest.param(
            ParallelConfig(context_parallel_size=2),
            marks=pytest.mark.skipif(
                not params_have_cp_group(), reason="megatron-core 0.14 and 0.15 refuse it"
            ),
        ),
    ],
    ids=["tensor parallelism and an interleaved pipeline", "context parallelism"],
)
def test_mrope(tool: ModuleType, parallel: ParallelConfig) -> None:
    model = small_model(tool, num_attention_heads=4, num_query_groups=2, mrope_section=[1, 2, 1])
    report = tool.verify(
        model=dataclasses.replace(model, position_embedding_type="mrope"),
        shapes=SHAPES_OF_RANKS,
        parallel=parallel,
        packing={**ALWAYS, "sharing": "everything"},
    )
    assert_exact(tool, report)


@pytest.mark.skipif(not replays_routes(), reason="megatron-core before 0.16")
@pytest.mark.parametrize(
    ("parallel", "options"),
    [
        (
            {
                "pipeline_model_parallel_size": 2,
                "context_parallel_size": 2,
                "expert_model_parallel_size": 2,
            },
            {"optimizer_steps": 2, "recompute": "full"},
        ),
        ({}, {"token_budget": 34, "packing": SERIES}),
    ],
    ids=["pipeline and context parallel", "series"],
)
def test_replayed_routes(
    tool: ModuleType, parallel: dict[str, Any], options: dict[str, Any]
) -> None:
    model = small_model(
        tool,
        num_moe_experts=6,
        moe_router_topk=2,
        moe_ffn_hidden_size=24,
        moe_layer_freq=[0, 1, 1, 1],
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=1e-3,
    )
    report = tool.verify(
        model=model,
        shapes=SHAPES_OVER_THE_BUDGET,
        parallel=ParallelConfig(**parallel),
        **{
            **options,
            "packing": {**ALWAYS, **options.get("packing", {}), "replayed_routes": "exact"},
        },
    )
    assert_exact(tool, report)


# Turns of tools, first, last and in between; responses that share turns with some of their group or
# with none of it; and a group without any.


LOSSES = {"aux_loss": 0.5, "seq_aux_loss": 0.3}
if has_global_auxiliary_loss():
    LOSSES["global_aux_loss"] = 0.4
AUXILIARY_LOSSES = {
    "moe_router_load_balancing_type": list(LOSSES),
    "moe_aux_loss_coeff": list(LOSSES.values()),
}


@pytest.mark.parametrize(
    ("parallel", "data", "options"),
    [
        ({}, 2, {"optimizer_steps": 3}),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1, {}),
        ({"context_parallel_size": 2, "expert_model_parallel_size": 2}, 1, {"recompute": "full"}),
        ({}, 1, {"token_budget": 34, "packing": SERIES}),
    ],
    ids=["data parallel", "tensor and pipeline parallel", "context parallel", "series"],
)
def test_losses_of_routers(
    tool: ModuleType, parallel: dict[str, int], data: int, options: dict[str, Any]
) -> None:
    """Means over each microbatch, in which a token counts once for each of its sequences."""
    transformer = {"moe_z_loss_coeff": 0.3}
    if "packing" not in options:  # Rows of a series cannot have the others.
        transformer |= AUXILIARY_LOSSES
    report = tool.verify(
        model=small_model(
            tool,
            num_moe_experts=4,
            moe_router_topk=2,
            moe_ffn_hidden_size=24,
            **transformer,
        ),
        shapes=SHAPES_OVER_THE_BUDGET,
        parallel=ParallelConfig(**parallel),
        data_parallel_size=data,
        **{"packing": ALWAYS, "token_budget": 70, **options},
    )
    assert_exact(tool, report)
