"""The planner's gated delta nets against real models: memory, and bytes between ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.config import OptimizerSettings, ParallelConfig
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.model.build import build_model_chunks
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.planning.activation_memory import kept_of_ranks
from megatron_prefix.planning.parameter_memory import static_bytes
from megatron_prefix.planning.rank_sizes import RankSizes
from megatron_prefix.planning.sizes import memory_model, rank_sizes
from megatron_prefix.training.step import accumulate_gradients
from tests.distributed import run_distributed
from tests.megatron.models import HAS_GATED_DELTA_NET, HYBRID, ON_CPU, single_process
from tests.planning.measured_memory import group_batch, kept_bytes
from tests.planning.test_memory import (
    KEPT_TOLERANCE,
    PEAK_TOLERANCE,
    _estimate,
    _kept,
    _memory,
    _model,
    _step_peak,
    _training,
)

pytestmark = pytest.mark.skipif(not HAS_GATED_DELTA_NET, reason="megatron-core before 0.16")

THREE_TO_ONE = {**HYBRID, "num_layers": 4, "linear_attention_freq": 4}
RECURRENT_LAST = {**HYBRID, "linear_attention_freq": [1, 0, 1]}
# As long as chunks, a little longer, and much shorter.
LONG, SHORT = (300, [256, 128, 200]), (100, [30] * 8)
CASES = [
    ("float32", "none", LONG, THREE_TO_ONE, True),
    ("bfloat16", "none", SHORT, THREE_TO_ONE, False),
    ("float32", "none", SHORT, RECURRENT_LAST, True),
    ("bfloat16", "full", LONG, RECURRENT_LAST, True),
]


def test_kept_tensors_and_peaks_are_those_of_real_models() -> None:
    with single_process(float64=False):
        for dtype, recompute, shape, options, trim in CASES:
            case = f"{dtype}, {recompute}, {shape}, {options}"
            model, parallel = _model(**options), ParallelConfig()
            training = _training(dtype, recompute, trim_last_layer=trim)
            memory, ranks = _memory(model, training), RankSizes()
            chunks = build_model_chunks(model, parallel, training, use_distributed_optimizer=False)
            layers = list(range(memory.shape.num_layers))
            static = static_bytes(memory, layers, ranks, first=True, last=True)
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


def _on_two_ranks(kind: str, shape: tuple[int, list[int]]) -> dict[str, tuple[int, int]]:
    """Predicted and measured: bytes that a layer receives, and bytes that are kept."""
    parallel = ParallelConfig(context_parallel_size=2)
    model = _model(
        **{**HYBRID, "num_layers": 1, "linear_attention_freq": [1], "cp_comm_type": kind}
    )
    training = _training("float32", trim_last_layer=False)
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
        kept = _kept(memory, batch, ranks) + kept_of_ranks(memory, [0], row.recurrent, ranks)
        assert estimate.context_parallel_bytes == 0
        return {
            "received": (estimate.recurrent_bytes, counted),
            "kept": (kept, kept_bytes(chunks, batch)),
        }


KINDS = {
    "states": ("all_gather", (300, [100, 90, 110, 64])),
    "states of a deep row": ("p2p", (7, [600, 20])),
    "heads": ("a2a", (300, [100, 90, 110, 64])),
}


def _two_ranks(rank: int, world_size: int) -> dict[str, Any]:
    return {name: _on_two_ranks(*case) for name, case in KINDS.items()}


def test_two_ranks_receive_and_keep_what_is_predicted() -> None:
    results = run_distributed(_two_ranks, 2, timeout=300)
    for name in KINDS:
        received = [result[name]["received"] for result in results]
        assert received[0][0] == max(counted for _, counted in received) > 0, name
        # States are those of the rank that begins with most.
        kept = [result[name]["kept"] for result in results]
        assert max(p for p, _ in kept) == pytest.approx(max(m for _, m in kept), rel=0.005), name
