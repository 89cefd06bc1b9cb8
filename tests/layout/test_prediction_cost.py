"""FLOPs of multi-token prediction, against the rows that the depths run on."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.layout import ModelShape, PackedLayout, PrefixTree, pack
from megatron_prefix.layout.layer_shapes import PredictionShape
from megatron_prefix.layout.predictions import shifted_layouts
from megatron_prefix.layout.tree_cost import tree_flops, ungrouped_flops

from .strategies import SHAPE, trees

ONE_LAYER = dataclasses.replace(SHAPE, num_layers=1, num_moe_layers=0)


def _rows(layout: PackedLayout) -> np.ndarray:
    """Positions of the tokens of a row, without padding."""
    return layout.position_ids[: layout.num_tokens - layout.num_padding]


def _expected(model: ModelShape, layouts: list[PackedLayout]) -> int:
    """A layer of the model on the rows of each shift but the last, and all labels of the next."""
    layer = dataclasses.replace(
        model, num_layers=1, predictions=None, windowed_layers=(True,) * bool(model.window)
    )
    projection = 2 * 2 * model.hidden_size * model.hidden_size
    total = 0
    for layout, following in itertools.pairwise(layouts):
        positions = _rows(layout)
        seen = positions + 1
        if model.window:
            seen = np.minimum(seen, model.window + 1)
        total += len(positions) * (layer.linear_flops_per_token() + projection)
        total += int(seen.sum()) * layer.attention_flops_per_pair(windowed=bool(model.window))
        total += len(_rows(following)) * model.head_flops_per_label()
    return total


@settings(deadline=None, max_examples=40)
@given(trees(), st.integers(1, 4), st.sampled_from([0, 2]))
def test_each_depth_counts_its_own_row_and_its_labels(
    tree: PrefixTree, depths: int, window: int
) -> None:
    model = dataclasses.replace(ONE_LAYER, window=window)
    predicting = dataclasses.replace(
        model, predictions=PredictionShape(depths=depths, windowed=(window > 0,) * depths)
    )
    every = tree.packed_lengths
    further = tree_flops(predicting, tree, labels=every) - tree_flops(model, tree, labels=every)
    assert further == _expected(model, shifted_layouts(pack(tree), depths))

    alone = [
        PrefixTree.from_sequences([tree.sequence_tokens(i).tolist()])
        for i in range(tree.num_sequences)
    ]
    further = ungrouped_flops(predicting, tree, labels=every)
    further -= ungrouped_flops(model, tree, labels=every)
    assert further == sum(_expected(model, shifted_layouts(pack(t), depths)) for t in alone)


def test_prediction_layers_have_experts_where_the_last_layer_has() -> None:
    experts = dataclasses.replace(
        ONE_LAYER,
        num_layers=2,
        num_moe_layers=1,
        num_experts=4,
        num_experts_per_token=2,
        moe_ffn_hidden_size=6,
        predictions=PredictionShape(depths=1, experts=True),
    )
    dense = dataclasses.replace(experts, predictions=PredictionShape(depths=1))
    tree = PrefixTree.from_groups([([1, 2, 3], [[4, 5], [6]])])
    matmuls = 3 if experts.gated_linear_unit else 2
    of_experts = matmuls * 2 * experts.hidden_size * 2 * 6 + 2 * experts.hidden_size * 4
    of_mlp = matmuls * 2 * experts.hidden_size * experts.ffn_hidden_size
    # The row of shift 1 has five tokens.
    assert tree_flops(experts, tree) - tree_flops(dense, tree) == 5 * (of_experts - of_mlp)
