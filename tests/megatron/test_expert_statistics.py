"""Statistics of experts count a shared token once for each of its sequences, and padding never.

The reference is Megatron's own model, which runs one whole sequence after the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.config import ParallelConfig, TrainingConfig
from megatron_prefix.config.packing import packing_of_run
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layout import PackedLayout, PrefixTree, pack
from megatron_prefix.model.build import build_gpt_model, model_shape
from megatron_prefix.model.transformer_config import transformer_config
from megatron_prefix.planning.sizes import memory_model
from tests.distributed import run_distributed
from tests.megatron.models import (
    TRAINING,
    assert_equal_training,
    model_config,
    model_pair,
    packed_logits,
    random_groups,
    sequence_logits,
    single_process,
)

MODEL = model_config(
    {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 24,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 1e-3,
    }
)
SHAPES = [(9, [4, 6, 1]), (1, [5, 1]), (12, [3]), (5, [1, 17, 2])]


def counts(model: GPTModel) -> list[list[int]]:
    """Of each layer: the tokens that its experts were given."""
    found = []
    for module in model.modules():
        if isinstance(module, TopKRouter):
            values = module.local_tokens_per_expert
            assert torch.equal(values, values.round())
            found.append(values.long().tolist())
    return found


def expected_counts(reference: GPTModel, tree: PrefixTree) -> list[list[int]]:
    for i in range(tree.num_sequences):
        sequence_logits(reference, tree.sequence_tokens(i))
    return counts(reference)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("trim_last_layer", [False, True], ids=["", "trimmed last layer"])
def test_training_counts_what_the_unmodified_model_counts(
    recompute: str, trim_last_layer: bool
) -> None:
    training = TrainingConfig(
        steps=1, token_budget=1024, dtype="float64", device="cpu", recompute=recompute
    )
    with single_process():
        reference, grouped = model_pair(MODEL, training)
        tree = random_groups(np.random.default_rng(), SHAPES)
        assert_equal_training(reference, grouped, tree, 1e-11, trim_last_layer=trim_last_layer)
        found = counts(grouped)
        assert found == counts(reference)
        # Each token goes to two experts, in both layers.
        assert [sum(layer) for layer in found] == [2 * tree.ungrouped_tokens] * 2


def test_padding_and_passes_without_gradients_count_nothing() -> None:
    with single_process():
        reference, grouped = model_pair(MODEL)
        tree = random_groups(np.random.default_rng(), SHAPES)
        layout = pack(tree, pad_to_multiple=64)
        assert layout.num_padding
        with torch.no_grad():
            packed_logits(grouped, layout)
        assert not any(map(any, counts(grouped)))
        packed_logits(grouped, layout)
        assert counts(grouped) == expected_counts(reference, tree)


def test_a_batch_without_prefix_params_counts_as_megatrons_own() -> None:
    with single_process():
        reference, grouped = model_pair(MODEL)
        tree = random_groups(np.random.default_rng(), SHAPES)
        packed_logits(grouped, pack(tree))
        before = counts(grouped)
        tokens = tree.sequence_tokens(0)
        sequence_logits(grouped, tokens)
        sequence_logits(reference, tokens)
        added = np.array(counts(grouped)) - before
        assert added.tolist() == counts(reference)


def test_a_z_loss_needs_a_scale_where_gradients_are_enabled() -> None:
    model = model_config({"num_moe_experts": 4, "moe_ffn_hidden_size": 24, "moe_z_loss_coeff": 0.1})
    with single_process():
        _, grouped = model_pair(model)
        layout = pack(random_groups(np.random.default_rng(), SHAPES))
        with torch.no_grad():
            packed_logits(grouped, layout)
        with pytest.raises(ValueError, match=r"\(moe_z_loss_coeff\).* no router_losses"):
            packed_logits(grouped, layout)


@pytest.mark.parametrize(("layers", "whole"), [([1, 0], False), ([0, 1], True)])
def test_a_last_layer_that_counts_is_planned_whole(layers: list[int], whole: bool) -> None:
    model = model_config({**MODEL.transformer, "moe_layer_freq": layers})
    config = transformer_config(model, ParallelConfig(), TRAINING)
    shape = model_shape(model, config)
    assert shape.whole_last_layer == whole
    packing = packing_of_run(TRAINING, ParallelConfig(), model_shape=shape, data_parallel_size=1)
    assert packing.trim_last_layer == memory_model(model, config, TRAINING).trim_last_layer
    assert packing.trim_last_layer != whole


LAYOUTS = {
    "tensor and sequence parallel": {"tensor_model_parallel_size": 2},
    "context parallel": {"context_parallel_size": 2},
}


def _layout() -> PackedLayout:
    return pack(random_groups(np.random.default_rng(0), SHAPES), pad_to_multiple=16)


def _count_on_ranks(rank: int, world_size: int, options: dict[str, Any]) -> list[list[int]]:
    parallel = ParallelConfig(**options)
    layout = _layout()
    with runtime(parallel, device="cpu", seed=3, timeout_minutes=1, float64=True) as place:
        model = build_gpt_model(MODEL, transformer_config(MODEL, parallel, TRAINING))
        setup = AttentionSetup.of(
            model.config, torch.device("cpu"), context_parallel_group=place.context_parallel_group
        )
        needed = np.flatnonzero(layout.multiplicity == 1)
        params = PrefixPackedSeqParams.from_layout(
            layout, setup, needed=needed, multiple=parallel.tensor_model_parallel_size
        )
        model(
            params.own(layout.input_ids)[None],
            params.position_ids[None],
            None,
            packed_seq_params=params,
        )
        return counts(model)


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_ranks_together_count_every_token_of_every_sequence(options: dict[str, Any]) -> None:
    ranks = run_distributed(_count_on_ranks, 2, options, init_process_group=False)
    total = np.sum(ranks, axis=0)
    tokens = _layout().tree.ungrouped_tokens
    assert total.sum(axis=1).tolist() == [2 * tokens] * 2
