"""The memory model against real GPTModels: kept tensors, peaks of a step, optimizer state."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from megatron_prefix.attention.row_attention import AttentionSetup, recurrence_width
from megatron_prefix.config import (
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    TrainingConfig,
)
from megatron_prefix.config.packing import packing_of_run
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.layout import COMM_TYPES, Packing, PrefixTree
from megatron_prefix.megatron.torch_adam import initialise_adam
from megatron_prefix.model.build import ModelChunks, build_model_chunks
from megatron_prefix.model.transformer_config import transformer_config
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.planning.activation_memory import kept_by_layer, kept_by_outer
from megatron_prefix.planning.backward_memory import largest_transient
from megatron_prefix.planning.estimate import StepEstimate, estimate_step
from megatron_prefix.planning.memory import MemoryModel
from megatron_prefix.planning.parameter_memory import static_bytes
from megatron_prefix.planning.rank_sizes import RankSizes
from megatron_prefix.planning.rows import StepSetup
from megatron_prefix.planning.sizes import memory_model, rank_sizes, stage_layers
from megatron_prefix.rollouts.records import RolloutGroup
from megatron_prefix.training.batch import PackedBatch
from megatron_prefix.training.minibatch import build_minibatch
from megatron_prefix.training.optimizer import build_optimizer
from megatron_prefix.training.series import BatchSeries
from megatron_prefix.training.step import accumulate_gradients
from tests.conversion.models import HAS_SHARED_EXPERT_GATE
from tests.distributed import run_distributed
from tests.megatron.models import (
    DELTA_NET,
    HAS_GATED_DELTA_NET,
    HAS_HYBRID_MODEL,
    HAS_PREDICTIONS,
    HAS_WINDOWS,
    HYBRID,
    ON_CPU,
    TRAINING,
    model_config,
    single_process,
)
from tests.megatron.models import LATENT as SMALL_LATENT
from tests.planning.measured_memory import group_batch, kept_bytes, peak_bytes

# A few bytes per token are left out: most of what is kept where full recompute keeps little.
KEPT_TOLERANCE = {"none": 0.005, "selective": 0.005, "full": 0.06}
PEAK_TOLERANCE = 0.1
LATENT = {
    **SMALL_LATENT,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_head_dim": 32,
    "qk_pos_emb_head_dim": 16,
    "v_head_dim": 24,
}
GPT_OSS = {
    "activation": "quick_gelu",
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 7.0,
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "softmax_type": "learnable",
}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 96}
PLAIN_MLP = {"normalization": "LayerNorm", "gated_linear_unit": False, "add_bias_linear": True}

RECEIVED: dict[str, dict[str, Any]] = {
    kind: {"kind": kind, **(LATENT if kind == "latent_gather" else {})} for kind in COMM_TYPES
}
RECEIVED["expanded latents"] = {"kind": "p2p", **LATENT}
if HAS_WINDOWS:
    RECEIVED["a window"] = {"kind": "p2p", "window_size": [30, 0]}
    RECEIVED["a window that hides nothing"] = {"kind": "p2p", "window_size": [1000, 0]}

CASES: list[tuple[str, str, int, tuple[int, list[int]], dict[str, Any]]] = [
    ("float32", "none", 64, (300, [256, 128, 200]), {}),
    ("float32", "selective", 2048, (64, [500]), {}),
    ("bfloat16", "full", 64, (300, [256, 128, 200]), {}),
    ("bfloat16", "none", 2048, (100, [30] * 8), {"qk_layernorm": True, "add_qkv_bias": True}),
    ("float32", "none", 64, (300, [256, 128]), {"qk_layernorm": True, **PLAIN_MLP}),
    ("bfloat16", "full", 64, (300, [256, 128]), EXPERTS),
    (
        "float32",
        "none",
        64,
        (300, [256, 128]),
        {**EXPERTS, "moe_shared_expert_intermediate_size": 64, "moe_layer_freq": [0, 1, 1]},
    ),
    ("float32", "none", 64, (300, [256, 128]), LATENT),
    (
        "float32",
        "selective",
        64,
        (300, [256, 128]),
        {**LATENT, "q_lora_rank": None, "qk_layernorm": False},
    ),
    ("bfloat16", "none", 64, (300, [256, 128]), {**LATENT, "qk_layernorm": False}),
    ("float32", "full", 64, (300, [256, 128]), LATENT),
]
all_heads = {"qk_norm_all_heads": True, "qk_layernorm": True}
CASES.append(("float32", "none", 64, (300, [256, 128]), all_heads))
if HAS_PREDICTIONS:
    CASES += [
        ("float32", "none", 64, (300, [256, 128]), {"mtp_num_layers": 2}),
        ("bfloat16", "full", 2048, (300, [256]), {**EXPERTS, "mtp_num_layers": 1}),
    ]
if HAS_WINDOWS:
    CASES.append(("float32", "none", 64, (300, [256, 128]), {**EXPERTS, **GPT_OSS}))
if HAS_SHARED_EXPERT_GATE:
    gated = {"moe_shared_expert_intermediate_size": 64, "moe_shared_expert_gate": True}
    CASES.append(("float32", "none", 64, (300, [256, 128]), {**EXPERTS, **gated}))
RECURRENT: dict[str, dict[str, Any]] = {}
STAGES: dict[str, dict[str, Any]] = {}
if HAS_GATED_DELTA_NET:
    RECURRENT["gated delta nets"] = HYBRID
if HAS_HYBRID_MODEL:
    mamba = {
        "mamba_num_heads": 16,
        "mamba_head_dim": 16,
        "mamba_num_groups": 4,
        "mamba_state_dim": 32,
    }
    RECURRENT["Mamba"] = {"hybrid_layer_pattern": "M-M", **mamba}
    STAGES["Mamba"] = {"hybrid_layer_pattern": "M-*|M-", **mamba}
    for pattern in ("*E-", "-*G"):
        hybrid = {"hybrid_layer_pattern": pattern, **DELTA_NET}
        experts = EXPERTS if "E" in pattern else {}
        CASES.append(("float32", "none", 64, (300, [256, 128]), {**hybrid, **experts}))


def _model(vocab_size: int = 64, **transformer: Any) -> ModelConfig:
    sizes = {"num_layers": 3, "hidden_size": 128, "ffn_hidden_size": 384}
    own = {
        name: transformer.pop(name)
        for name in ("activation", "qk_norm_all_heads", "hybrid_layer_pattern")
        if name in transformer
    }
    return model_config(
        {**sizes, **transformer},
        vocab_size=vocab_size,
        max_sequence_length=1024,
        **own,
    )


def _training(dtype: str, recompute: str = "none", **options: Any) -> TrainingConfig:
    return dataclasses.replace(TRAINING, dtype=dtype, recompute=recompute, **options)


def _memory(model: ModelConfig, training: TrainingConfig) -> MemoryModel:
    return memory_model(model, transformer_config(model, ParallelConfig(), training), training)


def _layers(memory: MemoryModel) -> list[int]:
    """Those of multi-token prediction behind the others."""
    return list(range(memory.shape.num_layers + memory.shape.prediction_depths))


def _kept(memory: MemoryModel, batch: PackedBatch, ranks: RankSizes) -> int:
    tokens = batch.num_tokens
    layers = sum(
        kept_by_layer(memory, layer, tokens, len(batch.labels), ranks) for layer in _layers(memory)
    )
    return layers + kept_by_outer(
        memory, tokens, len(batch.labels), ranks=ranks, first=True, last=True
    )


def _step_peak(chunks: ModelChunks, batches: Sequence[PackedBatch | BatchSeries]) -> int:
    def step() -> None:
        accumulate_gradients(chunks, batches, ObjectiveConfig())

    step()  # what is allocated once
    return peak_bytes(step)


def test_kept_tensors_and_peaks_are_those_of_real_models_on_one_process() -> None:
    with single_process(float64=False):
        for case_number, (dtype, recompute, vocab_size, shape, options) in enumerate(CASES):
            case = f"{dtype}, {recompute}, {options}"
            # Trimmed or not, in turn.
            trim = case_number % 2 == 0
            model = _model(vocab_size, **options)
            training = _training(dtype, recompute, trim_last_layer=trim)
            memory, ranks = _memory(model, training), RankSizes()
            chunks = build_model_chunks(
                model, ParallelConfig(), training, use_distributed_optimizer=False
            )
            layers = _layers(memory)
            static = static_bytes(memory, layers, ranks, first=True, last=True)
            parameters = sum(p.numel() * p.element_size() for p in chunks.bare[0].parameters())
            assert static.parameters == parameters, case
            assert static.gradients == sum(
                p.main_grad.numel() * p.main_grad.element_size()
                for p in chunks.bare[0].parameters()
            ), case

            depths = memory.shape.prediction_depths
            setup = dataclasses.replace(ON_CPU, recurrence_width=recurrence_width(chunks.config))
            batch = group_batch(*shape, trim_last_layer=trim, setup=setup, depths=depths)
            kept = _kept(memory, batch, ranks)
            assert kept == pytest.approx(
                kept_bytes(chunks, batch), rel=KEPT_TOLERANCE[recompute]
            ), case
            peak = kept + largest_transient(
                memory, layers, batch.num_tokens, len(batch.labels), ranks, last=True
            )
            assert peak == pytest.approx(_step_peak(chunks, [batch]), rel=PEAK_TOLERANCE), case


SERIES = [(300, [100] * 4 + [60, 40, 80]), (900, [60, 30, 50, 60])]
SERIES_CASES = [
    (*options, shape, {})
    for options in (
        ("float32", "none", True),
        ("bfloat16", "selective", False),
        ("bfloat16", "full", True),
    )
    for shape in SERIES
]
if HAS_GATED_DELTA_NET:
    SERIES_CASES.append(("bfloat16", "full", True, SERIES[0], HYBRID))
if HAS_HYBRID_MODEL:
    SERIES_CASES += [
        ("float32", "none", True, SERIES[0], RECURRENT["Mamba"]),
        ("bfloat16", "full", False, SERIES[1], RECURRENT["Mamba"]),
    ]


@pytest.mark.parametrize(("dtype", "recompute", "trim", "shape", "transformer"), SERIES_CASES)
def test_a_series_holds_its_root_and_a_row_at_a_time(
    dtype: str,
    recompute: str,
    trim: bool,
    shape: tuple[int, list[int]],
    transformer: dict[str, Any],
) -> None:
    prefix, responses = shape
    model = _model(**transformer)
    training = _training(dtype, recompute, trim_last_layer=trim, share_across_microbatches=True)
    budget = prefix + max(responses) + 60
    with single_process(float64=False):
        chunks = build_model_chunks(
            model, ParallelConfig(), training, use_distributed_optimizer=False
        )
        memory = memory_model(model, chunks.config, training)
        packing = _packing(memory, training, ParallelConfig(), token_budget=budget)
        rng = np.random.default_rng(0)
        group = RolloutGroup(
            prompt=rng.integers(0, 61, prefix),
            responses=[rng.integers(0, 61, n) for n in responses],
            rewards=rng.normal(size=len(responses)),
            source="here",
        )
        minibatch = build_minibatch(
            [group],
            ObjectiveConfig(),
            packing,
            attention=AttentionSetup.of(chunks.config, ON_CPU.device),
            data_parallel_rank=0,
        )
        measured = _step_peak(chunks, minibatch.batches)
        series = [batch for batch in minibatch.batches if isinstance(batch, BatchSeries)]
    estimate = estimate_step(
        [PrefixTree.from_groups([(group.prompt, group.responses)])],
        StepSetup(
            memory=memory,
            ranks=RankSizes(),
            stages=stage_layers(chunks.config),
            packing=packing,
        ),
        first_trained=[[prefix] * len(responses)],
    )
    assert len(minibatch.batches) == len(series) == estimate.num_series == 1
    assert len(series[0].rows) == len(estimate.microbatches[0][0].rows) - 1 > 1
    assert estimate.tokens == minibatch.packed_tokens
    (stage,) = estimate.stages
    assert stage.activations + stage.transient == pytest.approx(measured, rel=PEAK_TOLERANCE)


@pytest.mark.skipif(not HAS_WINDOWS, reason="megatron-core 0.14, which refuses windows")
@pytest.mark.parametrize(
    ("dtype", "recompute", "transformer"),
    [
        ("float32", "none", {"ffn_hidden_size": 64}),
        ("float32", "full", {"ffn_hidden_size": 64, "num_query_groups": 4}),
        ("bfloat16", "full", {"ffn_hidden_size": 64}),
    ],
)
def test_layers_with_a_window_hold_copies_of_keys(
    dtype: str, recompute: str, transformer: dict[str, Any]
) -> None:
    window, prefix, responses = 90, 300, [20] * 30
    model = _model(window_size=[window, 0], **transformer)
    training = _training(dtype, recompute, trim_last_layer=False)
    with single_process(float64=False):
        chunks = build_model_chunks(
            model, ParallelConfig(), training, use_distributed_optimizer=False
        )
        setup = dataclasses.replace(ON_CPU, window=window)
        batch = group_batch(prefix, responses, trim_last_layer=False, setup=setup)
        measured = _step_peak(chunks, [batch])
        memory = memory_model(model, chunks.config, training)
        estimate = _estimate(memory, training, ParallelConfig(), (prefix, responses))
    (row,) = estimate.microbatches[0][0].rows
    assert row.windows.copied == batch.num_tokens + window * len(responses)
    (stage,) = estimate.stages
    assert stage.activations + stage.transient == pytest.approx(measured, rel=PEAK_TOLERANCE)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_embeddings_are_those_of_a_real_model(tied: bool) -> None:
    model = dataclasses.replace(
        _model(num_layers=1),
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=tied,
        make_vocab_size_divisible_by=40,
    )
    training = _training("float32")
    with single_process(float64=False):
        chunks = build_model_chunks(
            model, ParallelConfig(), training, use_distributed_optimizer=False
        )
    static = static_bytes(_memory(model, training), [0], RankSizes(), first=True, last=True)
    assert static.parameters == 4 * sum(p.numel() for p in chunks.bare[0].parameters())


def _two_ranks(rank: int, world_size: int) -> dict[str, Any]:
    return {
        "tensor parallel": {
            "dense": _tensor_parallel({}),
            "split experts": _tensor_parallel(EXPERTS),
            "spread experts": _tensor_parallel(EXPERTS, expert_model_parallel_size=2),
            **{name: _tensor_parallel(options) for name, options in RECURRENT.items()},
        },
        "optimizer": {dtype: _optimizer_bytes(dtype) for dtype in ("bfloat16", "float32")},
        "pipeline": {
            "a chunk": _pipeline_peak(),
            "two chunks": _pipeline_peak(2),
            **({"predictions": _pipeline_peak(mtp_num_layers=1)} if HAS_PREDICTIONS else {}),
            **{name: _pipeline_peak(**options) for name, options in STAGES.items()},
        },
        "context parallel": {name: _received(**options) for name, options in RECEIVED.items()},
    }


def _tensor_parallel(transformer: dict[str, Any], **sizes: int) -> tuple[int, int, int, int]:
    """Predicted and measured: kept bytes, parameter bytes."""
    parallel = ParallelConfig(tensor_model_parallel_size=2, **sizes)
    model, training = _model(**transformer), _training("bfloat16")
    with runtime(parallel, device="cpu", seed=3, timeout_minutes=2):
        chunks = build_model_chunks(model, parallel, training, use_distributed_optimizer=True)
        ranks = rank_sizes(parallel, OptimizerSettings(), data_parallel_size=1)
        memory = memory_model(model, chunks.config, training)
        batch = group_batch(
            *(300, [256, 128, 200]),
            setup=AttentionSetup.of(chunks.config, ON_CPU.device),
            pad_to_multiple=2,
            output_multiple=2,
        )
        parameters = sum(p.numel() * p.element_size() for p in chunks.bare[0].parameters())
        return (
            _kept(memory, batch, ranks),
            kept_bytes(chunks, batch),
            static_bytes(memory, _layers(memory), ranks, first=True, last=True).parameters,
            parameters,
        )


def _optimizer_bytes(dtype: str) -> tuple[int, int]:
    """Predicted and measured, of Megatron's distributed optimizer on two data-parallel ranks."""
    model, training, parallel = _model(), _training(dtype), ParallelConfig()
    with runtime(parallel, device="cpu", seed=3, timeout_minutes=2):
        chunks = build_model_chunks(model, parallel, training, use_distributed_optimizer=True)
        ranks = rank_sizes(parallel, OptimizerSettings(), data_parallel_size=2)
        optimizer = build_optimizer(OptimizerSettings(), chunks)
        initialise_adam(optimizer)
        memory = memory_model(model, chunks.config, training)
        own = {p.untyped_storage().data_ptr() for p in chunks.bare[0].parameters()}
        measured = 0
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            for group in part.optimizer.param_groups:
                for main in group["params"]:
                    state = part.optimizer.state[main]
                    tensors = [state["exp_avg"], state["exp_avg_sq"]]
                    # Float32 parameters have no copy: the optimizer's are views of them.
                    if main.untyped_storage().data_ptr() not in own:
                        tensors.append(main)
                    measured += sum(t.numel() * t.element_size() for t in tensors)
        return static_bytes(memory, [0, 1, 2], ranks, first=True, last=True).optimizer, measured


def _pipeline_peak(num_chunks: int = 1, **transformer: Any) -> tuple[int, int]:
    """Predicted and measured peak of this pipeline rank's step, over what it holds anyway."""
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=num_chunks if num_chunks > 1 else None,
    )
    model, training = _model(**{"num_layers": 4, **transformer}), _training("float32")
    shapes = [(200, [150, 60]), (300, [80, 90]), (100, [100]), (150, [150, 30])]
    with runtime(parallel, device="cpu", seed=3, timeout_minutes=2):
        chunks = build_model_chunks(model, parallel, training, use_distributed_optimizer=False)
        memory = memory_model(model, chunks.config, training)
        trees = [
            PrefixTree.from_groups([([0] * prefix, [[1 + i] * n for i, n in enumerate(responses)])])
            for prefix, responses in shapes
        ]
        estimate = estimate_step(
            trees,
            StepSetup(
                memory=memory,
                ranks=rank_sizes(parallel, OptimizerSettings(), data_parallel_size=1),
                stages=stage_layers(chunks.config),
                packing=_packing(memory, training, parallel, token_budget=480),
            ),
            first_trained=[[prefix] * len(responses) for prefix, responses in shapes],
        )
        # In the order of the plan, which is by cost.
        depths = memory.shape.prediction_depths
        setup = AttentionSetup.of(chunks.config, ON_CPU.device)
        made = [group_batch(*shape, setup=setup, depths=depths) for shape in shapes]
        by_tokens = {batch.num_tokens: batch for batch in made}
        batches = [by_tokens[m.tokens] for m in estimate.microbatches[0]]
        stage = estimate.stages[parallel_state.get_pipeline_model_parallel_rank()]
        parameters = sum(p.numel() * 4 for chunk in chunks.bare for p in chunk.parameters())
        assert stage.static.parameters == parameters
        return stage.activations + stage.transient, _step_peak(chunks, batches)


def _packing(
    memory: MemoryModel, training: TrainingConfig, parallel: ParallelConfig, *, token_budget: int
) -> Packing:
    """Prefixes are shared always: the rows that are measured are built so."""
    return packing_of_run(
        dataclasses.replace(training, token_budget=token_budget, share_only_where_it_pays=False),
        parallel,
        model_shape=memory.shape,
        data_parallel_size=1,
    )


def _estimate(
    memory: MemoryModel,
    training: TrainingConfig,
    parallel: ParallelConfig,
    shape: tuple[int, list[int]],
    **setup: Any,
) -> StepEstimate:
    """Of a step on one group."""
    prefix, responses = shape
    tree = PrefixTree.from_groups([([0] * prefix, [[1 + i] * n for i, n in enumerate(responses)])])
    return estimate_step(
        [tree],
        StepSetup(
            memory=memory,
            ranks=rank_sizes(parallel, OptimizerSettings(), data_parallel_size=1),
            stages=[[list(range(memory.shape.num_layers))]],
            packing=_packing(memory, training, parallel, token_budget=1024),
            **setup,
        ),
        first_trained=[[prefix] * len(responses)],
    )


def _received(kind: str, **transformer: Any) -> tuple[int, int]:
    """Predicted (of the busiest rank) and counted bytes that a layer receives."""
    parallel = ParallelConfig(context_parallel_size=2)
    model = _model(num_layers=1, cp_comm_type=kind, **transformer)
    training = _training("float32")
    shape = (300, [100, 90, 110, 64])
    with runtime(parallel, device="cpu", seed=3, timeout_minutes=2):
        chunks = build_model_chunks(model, parallel, training, use_distributed_optimizer=False)
        memory = memory_model(model, chunks.config, training)
        estimate = _estimate(memory, training, parallel, shape, comm_type=kind)
        batch = group_batch(
            *shape,
            pad_to_multiple=2,
            setup=AttentionSetup.of(
                chunks.config,
                torch.device("cpu"),
                context_parallel_group=parallel_state.get_context_parallel_group(),
            ),
        )
        accumulate_gradients(chunks, [batch], ObjectiveConfig())
        counted = sum(batch.params.attention.exchange.traffic.received.values())
        return estimate.context_parallel_bytes, counted


def test_two_ranks_hold_and_receive_what_is_predicted() -> None:
    results = run_distributed(_two_ranks, 2, timeout=300)
    for case in results[0]["tensor parallel"]:
        ranks = [result["tensor parallel"][case] for result in results]
        for predicted, _, parameters, held in ranks:
            assert parameters == held, case
            assert predicted == ranks[0][0], case
        # How many tokens come to a rank's experts depends on the routing.
        mean = sum(measured for _, measured, _, _ in ranks) / 2
        assert ranks[0][0] == pytest.approx(mean, rel=KEPT_TOLERANCE["none"]), case
    for result in results:
        for case, (predicted, measured) in result["pipeline"].items():
            assert predicted == pytest.approx(measured, rel=PEAK_TOLERANCE), case
    for dtype in ("bfloat16", "float32"):
        pairs = [result["optimizer"][dtype] for result in results]
        # Shards end where buckets do, not where parameters do.
        assert pairs[0][0] == pytest.approx(sum(measured for _, measured in pairs) / 2, rel=0.01)
        assert max(measured for _, measured in pairs) <= 1.02 * pairs[0][0]
    for name in RECEIVED:
        pairs = [result["context parallel"][name] for result in results]
        assert pairs[0][0] == max(counted for _, counted in pairs), name
