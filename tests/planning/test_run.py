"""Plans of a run: published ratios, real models' sizes, what a run would do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_prefix.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_prefix.config.loader import load_dataclass
from megatron_prefix.model.transformer_config import transformer_config
from megatron_prefix.planning.parameter_memory import static_bytes
from megatron_prefix.planning.rank_sizes import RankSizes
from megatron_prefix.planning.report import flops_unit
from megatron_prefix.planning.run import Plan, load_planned_run, plan_run, read_sections
from megatron_prefix.planning.shapes import parse_case
from megatron_prefix.planning.sizes import memory_model
from tests.megatron.models import HAS_HYBRID_MODEL

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "configs"
QWEN = CONFIGS / "qwen2.5-7b.yaml"

# As published with the models.
PARAMETERS = {
    "qwen2.5-7b": 7_615_616_512,
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-30b-a3b": 30_532_122_624,
}

# Prefix Grouper (arXiv 2506.05433): ungrouped over grouped at prefix 16384 and prefix / response
# 32. They are the ratio of tokens, G (P + R) / (P + G R): matrix products on tokens, which is what
# a 7B model mostly does.
PUBLISHED = {2: 1.94, 4: 3.67, 8: 6.6, 16: 11.0}


def _plan(
    case: str,
    *,
    data_parallel_size: int = 1,
    parallel: dict[str, Any] | None = None,
    **training: Any,
) -> Plan:
    run = load_planned_run(
        read_sections(QWEN),
        parallel=parallel or {},
        training={"token_budget": 1 << 19, **training},
        data_parallel_size=data_parallel_size,
    )
    return plan_run(run, [parse_case(case)])


def _activations(plan: Plan) -> tuple[int, int]:
    return tuple(
        side.worst.total - side.worst.static.total for side in (plan.grouped, plan.ungrouped)
    )


@pytest.mark.parametrize("group_size", PUBLISHED)
def test_ratios_of_the_prefix_grouper_paper(group_size: int) -> None:
    plan = _plan(f"{group_size},16384,512")
    digits = 1 if group_size > 4 else 2
    assert round(plan.tokens_ratio, digits) == pytest.approx(PUBLISHED[group_size])
    shape = plan.grouped.setup.memory.shape
    tree_tokens = [side.tokens for side in (plan.ungrouped, plan.grouped)]
    linear = [shape.flops(tokens=tokens, pairs=0, labels=0) for tokens in tree_tokens]
    assert round(linear[0] / linear[1], digits) == pytest.approx(PUBLISHED[group_size])
    # Causal attention saves less of its work, and the output layer nothing.
    assert 0.9 * plan.tokens_ratio < plan.flops_ratio < plan.tokens_ratio


def test_memory_trends_of_the_prefix_grouper_paper() -> None:
    """At prefixes of 4096, 8192 and 16384 it compares memory over prefix / response: always less
    than without grouping, by more where the ratio or the group is larger."""
    for prefix in (4096, 16384):
        savings = {
            (group_size, ratio): (lambda kept: kept[1] / kept[0])(
                _activations(_plan(f"{group_size},{prefix},{prefix // ratio}"))
            )
            for group_size in (2, 8)
            for ratio in (1, 8, 32)
        }
        assert all(saving > 1 for saving in savings.values())
        for group_size in (2, 8):
            by_ratio = [savings[group_size, ratio] for ratio in (1, 8, 32)]
            assert by_ratio == sorted(by_ratio)
        for ratio in (1, 8, 32):
            assert savings[8, ratio] > savings[2, ratio]


@pytest.mark.parametrize("name", PARAMETERS)
def test_example_configs_are_of_the_published_size(name: str) -> None:
    sections = read_sections(CONFIGS / f"{name}.yaml")
    assert sections.keys() == {"model"}
    model = load_dataclass(ModelConfig, sections["model"], path="model")
    training = TrainingConfig(steps=1, token_budget=1)
    memory = memory_model(model, transformer_config(model, ParallelConfig(), training), training)
    layers = list(range(memory.shape.num_layers))
    static = static_bytes(memory, layers, RankSizes(), first=True, last=True)
    assert static.parameters == 2 * PARAMETERS[name]


NEMOTRON_3_NANO = {
    "vocab_size": 131072,
    "max_sequence_length": 65536,
    "position_embedding_type": "none",
    "activation": "squared_relu",
    "hybrid_layer_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "transformer": {
        "hidden_size": 2688,
        "ffn_hidden_size": 1856,
        "num_attention_heads": 32,
        "num_query_groups": 2,
        "kv_channels": 128,
        "normalization": "RMSNorm",
        "num_moe_experts": 128,
        "moe_router_topk": 6,
        "moe_ffn_hidden_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
        "mamba_num_heads": 64,
        "mamba_head_dim": 64,
        "mamba_num_groups": 8,
        "mamba_state_dim": 128,
    },
}


@pytest.mark.skipif(not HAS_HYBRID_MODEL, reason="megatron-core before 0.18")
def test_a_hybrid_with_mamba_layers_is_planned_at_its_published_size() -> None:
    def plan(**parallel: int) -> Plan:
        run = load_planned_run(
            {"model": NEMOTRON_3_NANO},
            parallel=parallel,
            training={"token_budget": 65536},
            data_parallel_size=1,
        )
        return plan_run(run, [parse_case("8,16384,2048")])

    one = plan()
    assert round(one.grouped.worst.static.parameters / 2 / 1e9, 1) == 31.6
    states = plan(context_parallel_size=4).grouped.recurrent_bytes
    # Tensor-parallel ranks have half of the heads each.
    of_half = plan(context_parallel_size=4, tensor_model_parallel_size=2).grouped.recurrent_bytes
    assert of_half == states / 2 > 0


def test_sharding_divides_what_it_should() -> None:
    one = _plan("8,16384,512")
    tensor = _plan("8,16384,512", parallel={"tensor_model_parallel_size": 4})
    data = _plan("8,16384,512", data_parallel_size=4)
    static, by_tensor, by_data = (p.grouped.worst.static for p in (one, tensor, data))
    # Norms are on every rank.
    assert by_tensor.parameters == pytest.approx(static.parameters / 4, rel=1e-3)
    assert by_data.parameters == static.parameters
    assert by_data.optimizer == -(-static.optimizer // 4)
    # With sequence parallelism all but the head's and rotary tables' is divided.
    assert _activations(tensor)[0] == pytest.approx(_activations(one)[0] / 4, rel=0.1)
    context = _plan("8,16384,512", parallel={"context_parallel_size": 4})
    assert _activations(context)[0] == pytest.approx(_activations(one)[0] / 4, rel=0.1)
    # Half of the prompt's keys and values come in, and again, and the gradients of the own half.
    assert context.grouped.context_parallel_bytes > 0
    full = _plan("8,16384,512", recompute="full")
    assert _activations(full)[0] < 0.2 * _activations(one)[0]


def test_a_rate_turns_flops_into_a_bound_on_time() -> None:
    plan = _plan("8,16384,512")
    seconds = plan.grouped.seconds(flops_per_second=1e15, bytes_per_second=None)
    assert seconds == pytest.approx(plan.grouped.flops / 1e15)
    context = _plan("8,16384,512", parallel={"context_parallel_size": 2})
    free = context.grouped.seconds(flops_per_second=1e15, bytes_per_second=None)
    assert free == pytest.approx(seconds / 2, rel=0.05)
    sent = context.grouped.context_parallel_bytes * 28 / 1e9
    slow = context.grouped.seconds(flops_per_second=1e15, bytes_per_second=1e9)
    assert slow == pytest.approx(free + sent)


def test_a_run_that_shares_nothing_is_planned_so() -> None:
    plan = _plan("8,4096,512", sharing="none")
    assert plan.tokens_ratio == plan.flops_ratio == 1.0 and plan.skipped_groups == 0
    assert plan.grouped.tokens == _plan("8,4096,512").ungrouped.tokens


@pytest.mark.parametrize(
    ("flops", "unit"),
    [(3e17, "PFLOPs"), (2e14, "PFLOPs"), (5e13, "TFLOPs"), (4e8, "GFLOPs"), (7e6, "MFLOPs")],
)
def test_flops_are_shown_in_a_unit_that_fits(flops: float, unit: str) -> None:
    name, size = flops_unit(flops)
    assert name == unit and 0.1 <= flops / size < 1000
