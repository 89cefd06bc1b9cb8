from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.layout import (
    Packing,
    PrefixTree,
    TreeShape,
    share_where_it_pays,
    trained_labels,
)

from .strategies import SHAPE, group_lists, trees


def shape_of(tree: PrefixTree) -> TreeShape:
    """The same tree without its tokens."""
    return TreeShape(parents=tree.parents, node_lengths=tree.node_lengths, sequences=tree.sequences)


def assert_same_shape(found: TreeShape, expected: PrefixTree) -> None:
    assert type(found) is TreeShape
    assert found.parents == expected.parents
    assert found.sequences == expected.sequences
    for name in (
        "node_lengths",
        "packed_lengths",
        "first_positions",
        "multiplicity",
        "sequence_lengths",
    ):
        values, others = getattr(found, name), getattr(expected, name)
        assert values.dtype == np.int64
        np.testing.assert_array_equal(values, others, err_msg=name)
    assert found.grouped_tokens == expected.grouped_tokens
    assert found.ungrouped_tokens == expected.ungrouped_tokens


def test_a_group_of_lengths_is_a_root_with_a_child_for_each_response():
    shape = TreeShape.of_group(3, [2, 1])
    assert shape.parents == (-1, 0, 0)
    assert shape.sequences == ((0, 1), (0, 2))
    assert shape.node_lengths.tolist() == [3, 2, 1]
    assert shape.sequence_lengths.tolist() == [5, 4]
    assert shape.end_positions.tolist() == [3, 5, 4]
    assert (shape.grouped_tokens, shape.ungrouped_tokens) == (5, 7)


@settings(max_examples=150, deadline=None)
@given(st.lists(trees(), min_size=1, max_size=3), st.data())
def test_a_shape_becomes_what_its_tree_becomes(forest, data):
    shapes = [shape_of(tree) for tree in forest]
    tree, shape = PrefixTree.concat(forest), TreeShape.concat(shapes)
    assert_same_shape(shape, tree)
    assert_same_shape(shape.merge_chains(), tree.merge_chains())
    kept = data.draw(st.permutations(range(tree.num_sequences)))
    assert_same_shape(shape.subset(kept[1:]), tree.subset(kept[1:]))
    nodes = {node for node in range(tree.num_nodes) if data.draw(st.booleans())}
    assert_same_shape(shape.without(nodes), tree.without(nodes))
    for alone, expected in zip(shape.separate(), tree.separate(), strict=True):
        assert_same_shape(alone, expected)
    assert_same_shape(share_where_it_pays(shape, SHAPE), share_where_it_pays(tree, SHAPE))


@settings(max_examples=60, deadline=None)
@given(group_lists(), st.sampled_from(["groups", "none"]), st.integers(1, 3))
def test_a_batch_is_planned_by_its_lengths_alone(groups, sharing, ranks):
    packing = Packing(
        token_budget=40,
        data_parallel_size=ranks,
        model_shape=SHAPE,
        pad_to_multiple=1,
        microbatch_multiple=1,
        allow_split=True,
        sharing=sharing,
        trim_last_layer=True,
        share_only_where_it_pays=True,
        share_across_microbatches=False,
    )

    def plan(batch):
        first_trained = [[len(prefix)] * len(responses) for prefix, responses in groups]
        units, members, _ = packing.units(batch, first_trained)
        labels = [trained_labels(t, first) for t, first in zip(units, members, strict=True)]
        return packing.plan(units, labels=labels)

    with_tokens = plan([PrefixTree.from_groups([group]) for group in groups])
    by_length = plan([TreeShape.of_group(len(p), [len(r) for r in rs]) for p, rs in groups])
    assert by_length == with_tokens
    assert by_length.fingerprint() == with_tokens.fingerprint()


@given(trees())
def test_a_shape_with_the_tokens_of_its_sequences_is_the_tree(tree: PrefixTree) -> None:
    sequences = [tree.sequence_tokens(i) for i in range(tree.num_sequences)]
    found = PrefixTree.of_shape(shape_of(tree), sequences)
    assert found.parents == tree.parents and found.sequences == tree.sequences
    assert all(map(np.array_equal, found.tokens, tree.tokens))
