from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.layout import PrefixTree, pack

from .invariants import assert_layout, assert_row_without_root, visible_keys, visible_with_root
from .strategies import group_lists, sequence_lists, trees, trees_below_a_root


def test_a_group_packs_to_its_prefix_and_then_its_responses():
    layout = pack(PrefixTree.from_groups([([1, 2, 3], [[4, 5], [6]])]))
    assert layout.input_ids.tolist() == [1, 2, 3, 4, 3]
    assert layout.labels.tolist() == [2, 3, 4, 5, 6]
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 2]
    assert layout.multiplicity.tolist() == [2, 2, 1, 1, 1]
    assert layout.level_starts == (0, 2, 5)
    assert layout.max_seqlen == 4
    assert layout.sequence_positions(0).tolist() == [0, 1, 2, 3]
    assert layout.sequence_positions(1).tolist() == [0, 1, 4]
    assert visible_keys(layout.stages, 5).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert_layout(layout)


def test_groups_of_depth_two_need_two_attention_calls_however_many_there_are():
    layout = pack(PrefixTree.from_groups([([1, 2, 3], [[4], [5]]), ([1, 2], [[3, 4]])]))
    own, cross = layout.stages
    assert own.on.cu_q.tolist() == own.on.cu_k.tolist() == [0, 2, 3, 4, 5, 7]
    assert (cross.queries, cross.keys) == (slice(3, 7), slice(0, 3))
    assert cross.on.cu_q.tolist() == [0, 2, 4]
    assert cross.on.cu_k.tolist() == [0, 2, 3]
    assert (cross.on.max_q, cross.on.max_k) == (2, 2)
    assert_layout(layout)


def test_sequences_that_share_nothing_are_one_causal_call():
    layout = pack(PrefixTree.from_sequences([[1, 2, 3], [4, 5]]))
    assert len(layout.stages) == 1
    assert_layout(layout)


def test_the_children_of_a_one_token_root_take_its_place():
    layout = pack(PrefixTree.from_groups([([1, 2], [[3]]), ([7], [[8], [9]]), ([4, 5], [[6]])]))
    assert [(s.node, s.level) for s in layout.segments] == [
        (0, 0),
        (3, 0),
        (4, 0),
        (5, 0),
        (1, 1),
        (6, 1),
    ]
    assert layout.input_ids[1:3].tolist() == [7, 7]
    assert layout.position_ids[1:3].tolist() == [0, 0]
    # The one-token group has no descendants on level 1: rectangles without queries.
    assert layout.stages[1].on.cu_q.tolist() == [0, 1, 1, 1, 2]
    assert_layout(layout)


def test_a_deep_tree_sees_each_ancestor_level_in_one_call():
    tree = PrefixTree.from_sequences(
        [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6, 7, 8], [1, 2, 6, 7, 9], [5, 5], [1, 2, 3, 5, 5]]
    )
    layout = pack(tree)
    levels = len(layout.level_starts) - 1
    assert levels == 4
    assert len(layout.stages) == 1 + levels * (levels - 1) // 2
    assert_layout(layout)


@settings(max_examples=200, deadline=None)
@given(trees(), st.integers(1, 5))
def test_any_forest_packs_to_a_valid_layout(tree, pad_to_multiple):
    layout = pack(tree, pad_to_multiple=pad_to_multiple)
    assert_layout(layout)
    assert layout.num_tokens % pad_to_multiple == 0
    assert layout.num_padding < pad_to_multiple or tree.num_nodes == 0


@settings(max_examples=100, deadline=None)
@given(sequence_lists())
def test_the_trie_of_any_sequences_packs_to_a_valid_layout(sequences):
    layout = pack(PrefixTree.from_sequences(sequences))
    assert_layout(layout)
    # One position for each way in which some sequence begins, the first token alone apart.
    prefixes = {tuple(s[:n]) for s in sequences for n in range(2, len(s) + 1)}
    assert layout.num_tokens - layout.num_padding == len(prefixes)


@settings(max_examples=100, deadline=None)
@given(group_lists(), st.integers(0, 7))
def test_groups_pack_to_a_valid_layout_of_a_fixed_length(groups, extra):
    tree = PrefixTree.from_groups(groups)
    layout = pack(tree, pad_to=tree.grouped_tokens + 1 + extra)
    assert layout.num_padding == 1 + extra
    assert len(layout.level_starts) <= 3
    assert_layout(layout)


def test_an_empty_tree_packs_to_padding_only():
    empty = PrefixTree.from_groups([])
    for kwargs, num_tokens in (({}, 1), ({"pad_to_multiple": 4}, 4), ({"pad_to": 6}, 6)):
        layout = pack(empty, **kwargs)
        assert layout.num_tokens == layout.num_padding == num_tokens
        assert layout.segments == () and layout.level_starts == (0,)
        assert_layout(layout)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pad_to": 3}, "pad_to=3 is too short for the tree, which packs to 4 tokens"),
        ({"pad_to": 7, "pad_to_multiple": 2}, "pad_to=7 must be a multiple of pad_to_multiple=2"),
        ({"pad_to_multiple": 0}, "pad_to_multiple=0 must be at least 1"),
    ],
)
def test_impossible_padding_is_refused(kwargs, message):
    tree = PrefixTree.from_groups([([1, 2], [[3], [4, 5]])])
    with pytest.raises(ValueError, match=message):
        pack(tree, **kwargs)


def test_the_arrays_can_become_tensors_without_a_copy():
    layout = pack(PrefixTree.from_groups([([1, 2], [[3]])]))
    for values in (layout.input_ids, layout.labels, layout.position_ids, layout.multiplicity):
        assert values.flags.writeable and values.flags.c_contiguous
        assert isinstance(values, np.ndarray)


def test_a_row_without_its_root_goes_on_where_the_root_ends():
    tree = PrefixTree.from_groups([([1, 2, 3], [[4, 5], [6]])])
    row = pack(tree, root_elsewhere=True, pad_to_multiple=4)
    assert row.input_ids.tolist() == [3, 4, 3, 0]
    assert row.labels.tolist() == [4, 5, 6, 0]
    assert row.position_ids.tolist() == [2, 3, 2, 0]
    assert row.level_starts == (0, 3)
    assert row.max_seqlen == 4
    assert row.sequence_positions(0).tolist() == [0, 1]
    assert row.sequence_positions(1).tolist() == [2]
    seen = visible_with_root(row.stages, row.root_stage, num_tokens=4, num_root=2)
    assert seen.tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert_row_without_root(row, pack(tree))


@settings(max_examples=100, deadline=None)
@given(trees_below_a_root(), st.integers(1, 5))
def test_any_row_without_its_root_is_the_whole_row_less_the_root(tree: PrefixTree, multiple: int):
    row = pack(tree, root_elsewhere=True, pad_to_multiple=multiple)
    assert row.num_tokens % multiple == 0
    assert_row_without_root(row, pack(tree))


@pytest.mark.parametrize(
    "tree",
    [
        pytest.param(PrefixTree.from_sequences([[1, 2], [3, 4]]), id="two roots"),
        pytest.param(PrefixTree.from_sequences([[1, 2, 3]]), id="a root that ends"),
        pytest.param(PrefixTree.from_groups([([1], [[2], [3]])]), id="a one-token root"),
    ],
)
def test_only_one_root_that_goes_on_can_be_elsewhere(tree: PrefixTree):
    with pytest.raises(AssertionError, match="one root, which goes on"):
        pack(tree, root_elsewhere=True)
