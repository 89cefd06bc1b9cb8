from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.layout import (
    DeltaNetShape,
    MambaShape,
    ModelShape,
    PrefixTree,
    activation_tokens,
    pack,
)
from megatron_prefix.layout.labels import masked_labels, response_labels, trained_labels
from megatron_prefix.layout.pairs import attention_pairs
from megatron_prefix.layout.tree_cost import tree_flops, ungrouped_flops

from .invariants import visible_keys
from .strategies import SHAPE, trees

TWO_LAYERS = ModelShape(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=20,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=3,
    vocab_size=11,
    gated_linear_unit=False,
)


def test_linear_flops_agree_with_a_hand_count():
    # qkv 8 -> (4 + 2 + 2) * 3 = 24, projection 12 -> 8, MLP 8 -> 20 -> 8.
    per_layer = 2 * (8 * 24 + 12 * 8 + 8 * 20 + 20 * 8)
    assert TWO_LAYERS.linear_flops_per_token() == 2 * per_layer
    # A gated MLP has its first product twice.
    gated = dataclasses.replace(TWO_LAYERS, gated_linear_unit=True)
    assert gated.linear_flops_per_token() == 2 * (per_layer + 2 * 8 * 20)


def test_expert_layers_count_the_chosen_experts_the_shared_one_and_the_router():
    moe = dataclasses.replace(
        TWO_LAYERS,
        gated_linear_unit=True,
        num_moe_layers=1,
        num_experts=6,
        num_experts_per_token=2,
        moe_ffn_hidden_size=5,
        moe_shared_expert_ffn_hidden_size=7,
    )
    attention = 2 * (8 * 24 + 12 * 8)
    dense = 2 * 3 * 8 * 20
    experts = 2 * 3 * 8 * (5 + 5 + 7) + 2 * 8 * 6
    assert moe.linear_flops_per_token() == 2 * attention + dense + experts


def test_attention_and_head_flops_agree_with_a_hand_count():
    # Per layer and head: 3 multiply-adds for the score and 3 for the value, two FLOPs each.
    assert TWO_LAYERS.attention_flops_per_pair() == 2 * 4 * (2 * 3 + 2 * 3)
    assert TWO_LAYERS.head_flops_per_label() == 2 * 8 * 11


def test_a_group_agrees_with_a_hand_count():
    tree = PrefixTree.from_groups([([1, 2, 3], [[4, 5], [6]])])
    linear = TWO_LAYERS.linear_flops_per_token()
    pair = TWO_LAYERS.attention_flops_per_pair()
    head = TWO_LAYERS.head_flops_per_label()
    # Prefix: 2 tokens; responses: 2 and 1, which see the 2 and themselves.
    assert attention_pairs(tree).tolist() == [1 + 2, 3 + 4, 3]
    assert tree_flops(TWO_LAYERS, tree) == 5 * linear + 13 * pair + 3 * head
    # One by one: 4 tokens and 3 tokens.
    assert ungrouped_flops(TWO_LAYERS, tree) == 7 * linear + (10 + 6) * pair + 3 * head


def test_a_loss_on_the_prefix_too_scores_it_once_or_for_each_response():
    tree = PrefixTree.from_groups([([1, 2, 3], [[4, 5], [6]])])
    head = TWO_LAYERS.head_flops_per_label()
    every_label = tree.packed_lengths
    grouped = tree_flops(TWO_LAYERS, tree, labels=every_label) - tree_flops(TWO_LAYERS, tree)
    assert grouped == 2 * head
    ungrouped = ungrouped_flops(TWO_LAYERS, tree, labels=every_label)
    assert ungrouped - ungrouped_flops(TWO_LAYERS, tree) == 2 * 2 * head


def test_a_trimmed_last_layer_saves_all_of_the_prompt_but_keys_and_values():
    tree = PrefixTree.from_groups([([1, 2, 3], [[4, 5], [6]])])
    # Query 8 -> 12, projection 12 -> 8, MLP 8 -> 20 -> 8.
    token = 2 * (8 * 12 + 12 * 8 + 8 * 20 + 20 * 8)
    pair = TWO_LAYERS.attention_flops_per_pair() // 2
    saved = tree_flops(TWO_LAYERS, tree) - tree_flops(TWO_LAYERS, tree, trim_last_layer=True)
    assert saved == 2 * token + 3 * pair
    saved = ungrouped_flops(TWO_LAYERS, tree)
    saved -= ungrouped_flops(TWO_LAYERS, tree, trim_last_layer=True)
    assert saved == 2 * (2 * token + 3 * pair)


@settings(max_examples=60, deadline=None)
@given(trees())
def test_a_trimmed_last_layer_saves_the_same_in_one_sequence_however_it_is_divided(tree):
    labels = response_labels(tree)
    for i in range(tree.num_sequences):
        alone = tree.subset([i])
        own = response_labels(alone)
        options = {"labels": own, "trim_last_layer": True}
        assert tree_flops(SHAPE, alone, **options) == ungrouped_flops(SHAPE, alone, **options)
    assert tree_flops(SHAPE, tree, labels=labels, trim_last_layer=True) <= tree_flops(SHAPE, tree)


def test_the_prompt_is_not_scored_but_a_lone_sequence_is():
    tree = PrefixTree.from_sequences([[1, 2, 3], [1, 2, 4, 5], [1, 2, 4, 6], [8, 9]])
    assert [t.tolist() for t in tree.tokens] == [[1, 2], [3], [4], [5], [6], [8, 9]]
    assert response_labels(tree).tolist() == [0, 1, 1, 1, 1, 1]


@settings(max_examples=100, deadline=None)
@given(trees())
def test_pairs_are_those_that_the_stages_compute(tree):
    layout = pack(tree)
    seen = visible_keys(layout.stages, layout.num_tokens)
    assert attention_pairs(tree).sum() == seen[: tree.grouped_tokens].sum()


@settings(max_examples=100, deadline=None)
@given(trees())
def test_sharing_never_costs_flops(tree):
    assert tree_flops(SHAPE, tree) <= ungrouped_flops(SHAPE, tree)
    alone = [tree.subset([i]) for i in range(tree.num_sequences)]
    labels = [t.packed_lengths for t in alone]
    assert ungrouped_flops(SHAPE, tree, labels=tree.packed_lengths) == sum(
        tree_flops(SHAPE, t, labels=n) for t, n in zip(alone, labels, strict=True)
    )
    assert tree_flops(SHAPE, tree.merge_chains(), labels=tree.merge_chains().packed_lengths) == (
        tree_flops(SHAPE, tree, labels=tree.packed_lengths)
    )


@pytest.mark.parametrize("responses", [1, 4, 16])
def test_a_long_prefix_makes_a_group_cost_what_one_sequence_costs(responses):
    # (P + G R) / (G (P + R)) -> 1 / G as P grows, in attention and in the linear layers alike.
    tree = PrefixTree.from_groups([(np.zeros(100_000, dtype=int), [[1, 2]] * responses)])
    grouped, ungrouped = tree_flops(SHAPE, tree), ungrouped_flops(SHAPE, tree)
    assert ungrouped / grouped == pytest.approx(responses, rel=1e-2)
    if responses == 1:
        assert ungrouped == grouped


def test_activation_tokens_are_those_of_the_packed_row():
    tree = PrefixTree.from_groups([([1, 2], [[3], [4, 5]])])
    assert activation_tokens(tree) == pack(tree).num_tokens == 4
    assert activation_tokens(tree, pad_to_multiple=3) == 6
    assert activation_tokens(PrefixTree.from_groups([]), pad_to_multiple=3) == 3


def test_counts_are_exact_beyond_64_bits():
    huge = dataclasses.replace(SHAPE, num_layers=10**6, hidden_size=10**6)
    flops = huge.flops(tokens=np.int64(10**9), pairs=np.int64(10**18), labels=np.int64(1))
    assert flops == (
        10**9 * huge.linear_flops_per_token()
        + 10**18 * huge.attention_flops_per_pair()
        + huge.head_flops_per_label()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"num_query_groups": 3}, "num_attention_heads=4 must be a multiple of num_query_groups=3"),
        ({"num_moe_layers": 1}, "num_experts=0 must be at least 1"),
    ],
)
def test_an_impossible_shape_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TWO_LAYERS, **change)


def test_masked_labels_count_once_and_the_last_layer_runs_from_the_first_of_them():
    # A prompt of 3, a turn of 4 that two sequences share, then 2 and 5 of their own.
    turn = [4, 4, 4, 4]
    tree = PrefixTree.from_sequences(
        [[1, 2, 3, *turn, 5, 5], [1, 2, 3, *turn, 6, 6, 6, 6, 6], [1, 2, 3, 7]]
    )
    masks = [
        np.array([False, True, False, False, True, True]),
        np.array([False, True, True, False, False, True, False, True, False]),
        None,
    ]
    labels, spans = masked_labels(tree, [3, 3, 3], masks)
    assert labels.tolist() == [0, 2, 2, 2, 1]
    assert spans.tolist() == [0, 3, 2, 4, 1]
    untrimmed = tree_flops(TWO_LAYERS, tree, labels=labels, spans=spans)
    every = tree_flops(TWO_LAYERS, tree, labels=np.array([0, 4, 2, 5, 1]))
    assert every - untrimmed == 5 * TWO_LAYERS.head_flops_per_label()
    trimmed = tree_flops(TWO_LAYERS, tree, labels=labels, spans=spans, trim_last_layer=True)
    # The two inputs of the prompt, one of the turn (with 2 + 1 keys), one of the longest response.
    assert untrimmed - trimmed == TWO_LAYERS.last_layer_flops(tokens=4, pairs=(1 + 2) + 3 + 7)


@settings(max_examples=100, deadline=None)
@given(trees(), st.data())
def test_masks_that_leave_nothing_out_change_nothing(tree, data):
    first = [data.draw(st.integers(1, int(n))) for n in tree.sequence_lengths]
    every = [np.ones(n - f, dtype=bool) for n, f in zip(tree.sequence_lengths, first, strict=True)]
    expected = trained_labels(tree, first).tolist()
    for masks in (every, [None] * tree.num_sequences):
        labels, spans = masked_labels(tree, first, masks)
        assert labels.tolist() == spans.tolist() == expected


@pytest.mark.parametrize("trim_last_layer", [False, True])
def test_a_layer_for_each_part_counts_as_the_layers_of_these_parts(trim_last_layer: bool) -> None:
    pattern = dataclasses.replace(TWO_LAYERS, num_layers=4, kinds="*-*-", num_trimmed_layers=2)
    tree = PrefixTree.from_groups([([4] * 9, [[1, 2], [3]]), ([8, 9], [[5, 6, 7]])])
    expected, found = (
        tree_flops(shape, tree, trim_last_layer=trim_last_layer) for shape in (TWO_LAYERS, pattern)
    )
    assert found == expected


@settings(max_examples=60)
@given(trees(), st.integers(0, 12), st.booleans())
def test_windowed_layers_count_the_keys_within_the_window(tree, window, last):
    windowed = dataclasses.replace(TWO_LAYERS, windowed_layers=(not last, last), window=window)
    pair = TWO_LAYERS.attention_flops_per_pair() // 2
    lengths = tree.packed_lengths
    offsets = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
    at = offsets + np.repeat(tree.first_positions, lengths)
    hidden = (at - np.minimum(at, window)).sum()
    assert tree_flops(TWO_LAYERS, tree) - tree_flops(windowed, tree) == hidden * pair
    # The last layer is trimmed by its own pairs.
    before = offsets < np.repeat(lengths - response_labels(tree), lengths)
    seen = np.minimum(at, window) + 1 if last else at + 1
    trimmed = tree_flops(windowed, tree, trim_last_layer=True)
    assert tree_flops(windowed, tree) - trimmed == windowed.last_layer_flops(
        tokens=before.sum(), pairs=seen[before].sum()
    )


def test_sequences_one_by_one_have_windows_too():
    tree = PrefixTree.from_groups([([1, 2, 3], [[4, 5], [6]])])
    windowed = dataclasses.replace(TWO_LAYERS, windowed_layers=(True, False), window=1)
    pair = TWO_LAYERS.attention_flops_per_pair() // 2
    # Inputs of 4 and 3 tokens: 1 + 2 + 3 + 4 keys become 1 + 2 + 2 + 2, 1 + 2 + 3 become 1 + 2 + 2.
    assert ungrouped_flops(TWO_LAYERS, tree) - ungrouped_flops(windowed, tree) == (3 + 1) * pair


DELTA_NET = DeltaNetShape(
    num_key_heads=2, num_value_heads=4, key_channels=3, value_channels=5, width=4, chunk_tokens=64
)
MAMBA = MambaShape(
    num_heads=6, num_groups=2, head_channels=5, state_channels=3, width=4, chunk_tokens=64
)
# Numbers that are projected, and read; FLOPs of the convolution, and of the chunks.
RECURRENT = {
    # Queries and keys, values and gate, and a decay and a strength for each value head. Chunks of
    # 64: two products of keys, one of values and a triangular solution of both; and three products
    # with the state.
    DELTA_NET: (
        2 * 2 * 3 + 2 * 4 * 5 + 2 * 4,
        4 * 5,
        2 * 4 * (2 * 2 * 3 + 4 * 5),
        4 * (2 * 64 * (2 * 3 + 5) + 64 * (3 + 5) + 6 * 3 * 5),
    ),
    # x and gate, B and C of each group, and a step for each head. Chunks of 64: a product of C and
    # B of each group; of each head one with x, and two with the state.
    MAMBA: (
        2 * 6 * 5 + 2 * 2 * 3 + 6,
        6 * 5,
        2 * 4 * (6 * 5 + 2 * 2 * 3),
        2 * 2 * 64 * 3 + 6 * (2 * 64 * 5 + 2 * 2 * 3 * 5),
    ),
}


@settings(max_examples=60)
@given(trees(), st.booleans(), st.sampled_from(list(RECURRENT)))
def test_recurrent_layers_cost_the_same_for_every_token_and_see_no_keys(tree, last, recurrent):
    layers = (None, recurrent) if last else (recurrent, None)
    hybrid = dataclasses.replace(TWO_LAYERS, recurrent_layers=layers)
    h, tokens = TWO_LAYERS.hidden_size, int(tree.packed_lengths.sum())
    projected, values, convolution, chunks = RECURRENT[recurrent]
    attention = 2 * (
        TWO_LAYERS.query_weights + TWO_LAYERS.key_weights + TWO_LAYERS.projection_weights
    )
    per_token = 2 * h * (projected + values) + convolution + chunks - attention
    pairs = int(attention_pairs(tree).sum()) * TWO_LAYERS.attention_flops_per_pair() // 2
    assert tree_flops(hybrid, tree) - tree_flops(TWO_LAYERS, tree) == tokens * per_token - pairs
    if last:
        # A trimmed layer makes the state of all tokens, and goes on with those that are scored.
        mlp = 2 * 2 * h * TWO_LAYERS.ffn_hidden_size
        before = int((tree.packed_lengths - response_labels(tree)).sum())
        trimmed = tree_flops(hybrid, tree, trim_last_layer=True)
        assert tree_flops(hybrid, tree) - trimmed == before * (2 * h * values + mlp)


def test_a_model_may_have_recurrent_layers_of_both_kinds():
    kinds = dataclasses.replace(
        TWO_LAYERS, num_layers=3, kinds="GM-", recurrent_layers=(DELTA_NET, MAMBA, None)
    )
    h = TWO_LAYERS.hidden_size
    recurrent = sum(
        2 * h * (projected + values) + convolution + chunks
        for projected, values, convolution, chunks in RECURRENT.values()
    )
    assert kinds.linear_flops_per_token() == recurrent + 2 * 2 * h * TWO_LAYERS.ffn_hidden_size
    assert [kinds.mixes(layer) for layer in range(3)] == [True, True, False]
    assert kinds.num_attending_layers == kinds.attention_flops_per_pair() == 0
