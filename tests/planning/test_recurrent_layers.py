"""The planner's recurrent layers against real models: memory, and bytes between ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from torch.utils.flop_counter import FlopCounterMode

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.config import OptimizerSettings, ParallelConfig
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.layout import MambaShape, pack
from megatron_prefix.model.build import build_model, build_model_chunks, model_shape
from megatron_prefix.model.transformer_config import transformer_config
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.planning.activation_memory import kept_of_ranks
from megatron_prefix.planning.parameter_memory import static_bytes
from megatron_prefix.planning.rank_sizes import RankSizes
from megatron_prefix.planning.sizes import memory_model, rank_sizes
from megatron_prefix.training.step import accumulate_gradients
from tests.distributed import run_distributed
from tests.megatron.models import (
    DELTA_NET,
    HAS_GATED_DELTA_NET,
    HAS_HYBRID_MODEL,
    HYBRID,
    MAMBA,
    ON_CPU,
    packed_logits,
    random_groups,
    single_process,
)
from tests.planning.measured_memory import group_batch, kept_bytes
from tests.planning.test_memory import (
    KEPT_TOLERANCE,
    PEAK_TOLERANCE,
    _estimate,
    _kept,
    _layers,
    _memory,
    _model,
    _step_peak,
    _training,
)

pytestmark = pytest.mark.skipif(not HAS_GATED_DELTA_NET, reason="megatron-core before 0.16")

THREE_TO_ONE = {**HYBRID, "num_layers": 4, "linear_attention_freq": 4}
RECURRENT_LAST = {**HYBRID, "linear_attention_freq": [1, 0, 1]}
WIDE_VALUES = {"linear_key_head_dim": 16, "linear_value_head_dim": 32}
# As long as chunks, a little longer, and much shorter.
LONG, SHORT = (300, [256, 128, 200]), (100, [30] * 8)
CASES = [
    ("float32", "none", LONG, THREE_TO_ONE, True),
    ("bfloat16", "none", SHORT, THREE_TO_ONE, False),
    ("float32", "none", SHORT, RECURRENT_LAST, True),
    ("bfloat16", "full", LONG, RECURRENT_LAST, True),
    ("bfloat16", "none", LONG, {**RECURRENT_LAST, **WIDE_VALUES}, True),
]
# Sizes as in real models: states wider than heads, or heads wider than states.
WIDE_STATES = {
    "mamba_num_heads": 16,
    "mamba_head_dim": 16,
    "mamba_num_groups": 4,
    "mamba_state_dim": 64,
}
WIDE_HEADS = {
    "mamba_num_heads": None,
    "mamba_head_dim": 64,
    "mamba_num_groups": 1,
    "mamba_state_dim": 16,
}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 96}
if HAS_HYBRID_MODEL:
    CASES += [
        (dtype, recompute, shape, {"hybrid_layer_pattern": pattern, **sizes}, trim)
        for pattern, sizes, dtype, recompute, shape, trim in (
            ("M", MAMBA, "float32", "none", LONG, True),
            ("M", MAMBA, "bfloat16", "none", SHORT, False),
            ("-*M", WIDE_STATES, "bfloat16", "none", LONG, True),
            ("-*M", WIDE_HEADS, "float32", "none", SHORT, False),
            ("M*M-", WIDE_STATES, "float32", "selective", SHORT, False),
            ("MM", WIDE_HEADS, "bfloat16", "selective", SHORT, True),
            ("M*-", WIDE_HEADS, "float32", "full", LONG, True),
            ("-M", WIDE_STATES, "bfloat16", "full", SHORT, False),
            ("MEM", {**WIDE_STATES, **EXPERTS}, "bfloat16", "none", LONG, False),
            ("GM*", {**WIDE_HEADS, **DELTA_NET}, "float32", "none", LONG, True),
        )
    ]


def test_kept_tensors_and_peaks_are_those_of_real_models() -> None:
    with single_process(float64=False):
        for dtype, recompute, shape, options, trim in CASES:
            case = f"{dtype}, {recompute}, {shape}, {options}"
            model, parallel = _model(**options), ParallelConfig()
            training = _training(dtype, recompute, trim_last_layer=trim)
            memory, ranks = _memory(model, training), RankSizes()
            chunks = build_model_chunks(model, parallel, training, use_distributed_optimizer=False)
            static = static_bytes(memory, _layers(memory), ranks, first=True, last=True)
            assert static.parameters == sum(
                p.numel() * p.element_size() for p in chunks.bare[0].parameters()
            ), case
            setup = AttentionSetup.of(chunks.config, ON_CPU.device)
            batch = group_batch(*shape, trim_last_layer=trim, setup=setup)
            (stage,) = _estimate(memory, training, parallel, shape).stages
            assert stage.activations == _kept(memory, batch, ranks), case
            assert stage.activations == pytest.approx(
                kept_bytes(chunks, batch), rel=KEPT_TOLERANCE[recompute]
            ), case
            peak = stage.activations + stage.transient
            assert peak == pytest.approx(_step_peak(chunks, [batch]), rel=PEAK_TOLERANCE), case


@pytest.mark.skipif(not HAS_HYBRID_MODEL, reason="megatron-core before 0.18")
@pytest.mark.parametrize("sizes", [WIDE_STATES, WIDE_HEADS])
def test_flops_of_mamba_layers_are_those_that_a_real_model_runs(sizes: dict[str, Any]) -> None:
    """In chunks that are full; the convolution is no matrix product."""
    model = _model(hybrid_layer_pattern="M-*M", **sizes)
    tree = random_groups(np.random.default_rng(0), [(193, [128, 64, 64])])
    with single_process(float64=False):
        config = transformer_config(model, ParallelConfig(), _training("float32"))
        layout, built = pack(tree), build_model(model, config)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            packed_logits(built, layout)
    shape = model_shape(model, config)
    mamba = shape.recurrent_of(0)
    assert isinstance(mamba, MambaShape) and layout.num_tokens == 7 * mamba.chunk_tokens
    # Nothing is read from a state before the first chunk.
    first = mamba.chunk_tokens * 2 * mamba.num_states * mamba.state_size
    attended = sum(
        count for op, count in counter.get_flop_counts()["Global"].items() if "attention" in str(op)
    )
    expected = layout.num_tokens * (
        shape.linear_flops_per_token()
        + shape.head_flops_per_label()
        - 2 * mamba.convolution_flops_per_token()
    )
    assert counter.get_total_flops() - attended == expected - 2 * first


def _on_two_ranks(
    kind: str, shape: tuple[int, list[int]], dtype: str, options: dict[str, Any]
) -> dict[str, tuple[int, int]]:
    """Predicted and measured: bytes that the layers receive, that are kept, and at the peak."""
    parallel = ParallelConfig(context_parallel_size=2)
    model = _model(**{"num_layers": 1, "cp_comm_type": kind, **options})
    training = _training(dtype, trim_last_layer=False)
    with runtime(parallel, device="cpu", seed=3, timeout_minutes=2):
        chunks = build_model_chunks(model, parallel, training, use_distributed_optimizer=False)
        memory = memory_model(model, chunks.config, training)
        estimate = _estimate(memory, training, parallel, shape, comm_type=kind)
        setup = AttentionSetup.of(
            chunks.config,
            torch.device("cpu"),
            context_parallel_group=parallel_state.get_context_parallel_group(),
        )
        batch = group_batch(*shape, pad_to_multiple=2, setup=setup, trim_last_layer=False)
        accumulate_gradients(chunks, [batch], ObjectiveConfig())
        counted = sum(batch.params.attention.exchange.traffic.received.values())
        (row,) = estimate.microbatches[0][0].rows
        ranks = rank_sizes(parallel, OptimizerSettings(), data_parallel_size=1)
        kept = _kept(memory, batch, ranks) + kept_of_ranks(
            memory, _layers(memory), row.recurrent, batch.num_tokens, len(batch.labels), ranks
        )
        received = [
            row.recurrent[layer].received_per_layer for layer in memory.shape.recurrent_layers
        ]
        assert estimate.context_parallel_bytes == 0
        assert estimate.recurrent_bytes == max(received)
        (stage,) = estimate.stages
        return {
            "received": (sum(received), counted),
            "kept": (kept, kept_bytes(chunks, batch)),
            "peak": (stage.activations + stage.transient, _step_peak(chunks, [batch])),
        }


KINDS = {
    "states": ("all_gather", (300, [100, 90, 110, 64])),
    "states of a deep row": ("p2p", (7, [600, 20])),
    "heads": ("a2a", (300, [100, 90, 110, 64])),
}
LAYERS: dict[str, dict[str, Any]] = {
    "gated delta net": {**HYBRID, **WIDE_VALUES, "linear_attention_freq": [1]}
}
if HAS_HYBRID_MODEL:
    LAYERS["Mamba"] = {"hybrid_layer_pattern": "M", **WIDE_STATES}
    # A row has the inputs of the widest convolution at hand for all.
    LAYERS["both"] = {
        **WIDE_STATES,
        **DELTA_NET,
        "hybrid_layer_pattern": "GM",
        "linear_conv_kernel_dim": 6,
    }
ON_TWO_RANKS = {
    f"{layer}, {dtype}, {kind}": (*KINDS[kind], dtype, LAYERS[layer])
    for layer in LAYERS
    for dtype in ("float32", "bfloat16")
    for kind in KINDS
}


def _two_ranks(rank: int, world_size: int) -> dict[str, Any]:
    return {name: _on_two_ranks(*case) for name, case in ON_TWO_RANKS.items()}


def test_two_ranks_receive_and_keep_what_is_predicted() -> None:
    results = run_distributed(_two_ranks, 2, timeout=300)
    for name in ON_TWO_RANKS:
        received = [result[name]["received"] for result in results]
        assert received[0][0] == max(counted for _, counted in received) > 0, name
        # States are those of the rank that begins with most.
        for what, tolerance in (("kept", 0.005), ("peak", PEAK_TOLERANCE)):
            found = [result[name][what] for result in results]
            expected = pytest.approx(max(int(measured) for _, measured in found), rel=tolerance)
            assert max(predicted for predicted, _ in found) == expected, f"{what}, {name}"
