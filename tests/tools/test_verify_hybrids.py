"""`verify_equivalence.py` of models with recurrent layers, against Megatron's own ones."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from megatron_prefix.config import ParallelConfig
from tests.megatron.models import (
    DELTA_NET,
    HAS_GATED_DELTA_NET,
    HAS_HYBRID_MODEL,
    HYBRID,
    MAMBA,
    model_config,
)
from tests.tools.proofs import ALWAYS, SERIES, assert_exact, small_model, tool

__all__ = ["tool"]

pytestmark = pytest.mark.skipif(not HAS_GATED_DELTA_NET, reason="megatron-core before 0.16")

# A prompt of more than one chunk, prompts shorter than the convolution, segments of one token, and
# responses that share turns.
SHAPES: list[dict[str, Any]] = [
    {"prefix": 70, "responses": [4, 1]},
    {"prefix": 2, "responses": [3, 1, 2]},
    {"system": 9, "prefix": 20, "responses": [{"turns": [7, 1], "then": [5, 1]}, 4]},
    {"system": 9, "prefix": 1, "responses": [3, {"turns": [12], "then": [4, 6]}]},
]
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
# As Qwen3-Next has it.
THREE_TO_ONE = {
    **HYBRID,
    "linear_attention_freq": 4,
    "attention_output_gate": True,
    "layernorm_zero_centered_gamma": True,
    **EXPERTS,
    "moe_shared_expert_intermediate_size": 40,
    "moe_shared_expert_gate": True,
}
RECURRENT_ONLY = {**HYBRID, "linear_attention_freq": [1, 1, 1, 1]}


@pytest.mark.parametrize(
    ("transformer", "parallel", "data", "recompute"),
    [
        (
            THREE_TO_ONE,
            ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
            1,
            "full",
        ),
        (THREE_TO_ONE, ParallelConfig(expert_model_parallel_size=2), 2, "none"),
        (
            {**THREE_TO_ONE, "cp_comm_type": ["all_gather", "a2a", "p2p", "p2p"]},
            ParallelConfig(context_parallel_size=2, expert_model_parallel_size=2),
            1,
            "full",
        ),
        (
            RECURRENT_ONLY,
            ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
            1,
            "selective",
        ),
    ],
    ids=[
        "tensor and pipeline parallel",
        "expert parallel",
        "context and expert parallel",
        "no attention, interleaved pipeline",
    ],
)
def test_gated_delta_nets(
    tool: ModuleType,
    transformer: dict[str, Any],
    parallel: ParallelConfig,
    data: int,
    recompute: str,
) -> None:
    report = tool.verify(
        model=small_model(tool, **transformer),
        shapes=SHAPES,
        parallel=parallel,
        data_parallel_size=data,
        recompute=recompute,
        optimizer_steps=2,
        packing={**ALWAYS, "sharing": "everything"},
    )
    assert_exact(tool, report)


# Groups over the budget: a prompt of more than one chunk and one shorter than the convolution;
# responses of one token, and such that share a turn.
OVER_THE_BUDGET: list[dict[str, Any]] = [
    {"prefix": 70, "responses": [20, 1, 9, 14]},
    {"prefix": 3, "responses": [41, {"turns": [30], "then": [5, 1]}, 38]},
]


@pytest.mark.parametrize(
    "pattern",
    [
        None,
        pytest.param(
            "M*-M",
            marks=pytest.mark.skipif(not HAS_HYBRID_MODEL, reason="megatron-core before 0.18"),
        ),
    ],
)
def test_pieces_of_a_large_group_go_on_from_the_state_behind_its_prompt(
    tool: ModuleType, capfd: pytest.CaptureFixture[str], pattern: str | None
) -> None:
    model = small_model(tool, **HYBRID, num_layers=2)
    if pattern is not None:
        model = model_config(MAMBA, hybrid_layer_pattern=pattern, max_sequence_length=128)
    report = tool.verify(
        model=model,
        shapes=OVER_THE_BUDGET,
        parallel=ParallelConfig(),
        token_budget=95,
        recompute="full",
        packing=SERIES,
    )
    assert_exact(tool, report)
    assert "2 series of rows" in capfd.readouterr().out


@pytest.mark.skipif(not HAS_HYBRID_MODEL, reason="megatron-core before 0.18")
@pytest.mark.parametrize(
    ("pattern", "transformer", "parallel", "recompute"),
    [
        (
            "GE*-|G*-E",
            {},
            ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
            "full",
        ),
        (
            "G-*E*G-",
            {"cp_comm_type": ["all_gather", "p2p", "a2a", "p2p", "p2p", "a2a", "p2p"]},
            ParallelConfig(context_parallel_size=2, expert_model_parallel_size=2),
            "none",
        ),
        (
            "ME*|M|*-|GM",
            {},
            ParallelConfig(
                tensor_model_parallel_size=2,
                pipeline_model_parallel_size=2,
                virtual_pipeline_model_parallel_size=2,
            ),
            "full",
        ),
        (
            "MG*MEM-",
            {"cp_comm_type": ["all_gather", "p2p", "a2a", "a2a", "p2p", "p2p", "p2p"]},
            ParallelConfig(context_parallel_size=2, expert_model_parallel_size=2),
            "full",
        ),
    ],
    ids=[
        "tensor and pipeline parallel",
        "context and expert parallel",
        "Mamba, tensor parallel, interleaved pipeline",
        "Mamba, context and expert parallel",
    ],
)
def test_patterns_of_layers(
    tool: ModuleType,
    pattern: str,
    transformer: dict[str, Any],
    parallel: ParallelConfig,
    recompute: str,
) -> None:
    report = tool.verify(
        model=model_config(
            {**DELTA_NET, **MAMBA, **EXPERTS, **transformer},
            hybrid_layer_pattern=pattern,
            max_sequence_length=128,
        ),
        shapes=SHAPES,
        parallel=parallel,
        recompute=recompute,
        optimizer_steps=2,
        packing={**ALWAYS, "sharing": "everything"},
    )
    assert_exact(tool, report)
