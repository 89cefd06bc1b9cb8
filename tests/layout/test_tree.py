from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.layout import PrefixTree

from .strategies import group_lists, sequence_lists, trees


def contents(tree: PrefixTree) -> list[list[int]]:
    return [tree.sequence_tokens(i).tolist() for i in range(tree.num_sequences)]


def keys_of(tree: PrefixTree) -> list[list[int]]:
    return [tree.sequence_keys(i).tolist() for i in range(tree.num_sequences)]


def nodes(tree: PrefixTree) -> list[list[int]]:
    return [tokens.tolist() for tokens in tree.tokens]


def test_a_group_is_a_root_with_a_child_for_each_response():
    tree = PrefixTree.from_groups([([1, 2, 3], [[4, 5], [4, 6]]), ([1], [[7]])])
    assert tree.parents == (-1, 0, 0, -1, 3)
    assert nodes(tree) == [[1, 2, 3], [4, 5], [4, 6], [1], [7]]
    assert tree.sequences == ((0, 1), (0, 2), (3, 4))
    assert tree.multiplicity.tolist() == [2, 1, 1, 1, 1]
    assert tree.node_lengths.tolist() == [3, 2, 2, 1, 1]
    assert tree.packed_lengths.tolist() == [2, 2, 2, 0, 1]
    assert tree.first_positions.tolist() == [0, 2, 2, 0, 0]
    assert tree.sequence_lengths.tolist() == [5, 5, 2]
    assert tree.grouped_tokens == (3 - 1 + 2 + 2) + (1 - 1 + 1)
    assert tree.ungrouped_tokens == 4 + 4 + 1


def test_a_trie_shares_every_common_prefix():
    tree = PrefixTree.from_sequences([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6], [9, 9]])
    assert nodes(tree) == [[1, 2], [3], [4], [5], [6], [9, 9]]
    assert tree.parents == (-1, 0, 1, 0, 1, -1)
    assert tree.sequences == ((0, 1, 2), (0, 3), (0, 1, 4), (5,))
    assert tree.multiplicity.tolist() == [3, 2, 1, 1, 1, 1]


def test_a_sequence_may_end_inside_another():
    tree = PrefixTree.from_sequences([[1, 2, 3], [1, 2], [1, 2, 3]])
    assert nodes(tree) == [[1, 2], [3]]
    assert tree.sequences == ((0, 1), (0,), (0, 1))
    assert tree.multiplicity.tolist() == [3, 2]


def test_token_ids_of_any_size_are_told_apart():
    # Tokens that differ in one byte only, wherever that byte is.
    sequences = [[7, 1 << shift] for shift in range(0, 63, 8)] + [[7, -1], [7, 0]]
    tree = PrefixTree.from_sequences(sequences)
    assert contents(tree) == sequences
    assert nodes(tree) == [[7], *([t] for _, t in sequences)]


def test_two_images_with_one_placeholder_are_two_prefixes():
    image = 9
    first, second = [5, image, image, 6], [5, image, image, 7]
    tree = PrefixTree.from_sequences([first, second], keys=[[0, 41, 42, 0], [0, 81, 82, 0]])
    assert nodes(tree) == [[5], [image, image, 6], [image, image, 7]]
    assert tree.keys is not None
    assert [keys.tolist() for keys in tree.keys] == [[0], [41, 42, 0], [81, 82, 0]]
    # Without keys they would be merged.
    assert nodes(PrefixTree.from_sequences([first, second])) == [[5, image, image], [6], [7]]


@settings(max_examples=100, deadline=None)
@given(sequence_lists(min_size=1), st.data())
def test_sequences_share_where_tokens_and_keys_agree(sequences, data):
    keys = [
        data.draw(st.lists(st.integers(-1, 1), min_size=n, max_size=n)) for n in map(len, sequences)
    ]
    tree = PrefixTree.from_sequences(sequences, keys=keys)
    assert contents(tree) == sequences
    assert keys_of(tree) == keys
    # Token ids that say both.
    both = [
        [3 * t + k for t, k in zip(*pair, strict=True)]
        for pair in zip(sequences, keys, strict=True)
    ]
    expected = PrefixTree.from_sequences(both)
    assert tree.parents == expected.parents
    assert tree.sequences == expected.sequences
    assert tree.node_lengths.tolist() == expected.node_lengths.tolist()


@settings(max_examples=50, deadline=None)
@given(trees())
def test_the_trie_of_a_tree_has_its_sequences_and_shares_all_it_can(tree):
    trie = tree.as_trie()
    assert contents(trie) == contents(tree)
    assert keys_of(trie) == keys_of(tree)
    pairs = [
        list(zip(*both, strict=True)) for both in zip(contents(tree), keys_of(tree), strict=True)
    ]
    prefixes = {tuple(s[:n]) for s in pairs for n in range(1, len(s) + 1)}
    assert trie.node_lengths.sum() == len(prefixes)


def test_a_root_that_is_cut_keeps_its_keys():
    tree = PrefixTree.from_groups([([1, 2, 3], [[4], [5]])], keys=[([7, 8, 9], [[1], [2]])])
    cut = tree.with_root_of(2)
    assert nodes(cut) == [[1, 2], [3], [4], [5]]
    assert keys_of(cut) == keys_of(tree) == [[7, 8, 9, 1], [7, 8, 9, 2]]


@settings(max_examples=150, deadline=None)
@given(sequence_lists())
def test_a_trie_is_exact_and_as_small_as_can_be(sequences):
    tree = PrefixTree.from_sequences(sequences)
    assert contents(tree) == sequences
    prefixes = {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}
    assert tree.node_lengths.sum() == len(prefixes)
    ends = {path[-1] for path in tree.sequences}
    for node in range(tree.num_nodes):
        children = [c for c, parent in enumerate(tree.parents) if parent == node]
        assert len(children) != 1 or node in ends
        assert len({tree.tokens[c][0] for c in children}) == len(children)
    # Nodes are named by the first sequence through them, from its root on.
    named = dict.fromkeys(node for path in tree.sequences for node in path)
    assert list(named) == list(range(tree.num_nodes))


@settings(max_examples=100, deadline=None)
@given(group_lists())
def test_groups_keep_their_order_and_share_nothing_but_the_prefix(groups):
    tree = PrefixTree.from_groups(groups)
    assert contents(tree) == [p + r for p, responses in groups for r in responses]
    assert tree.num_nodes == sum(1 + len(responses) for _, responses in groups)
    assert tree.grouped_tokens == sum(
        len(p) - 1 + sum(map(len, responses)) for p, responses in groups
    )
    assert tree.ungrouped_tokens == sum(len(s) - 1 for s in contents(tree))


@settings(max_examples=100, deadline=None)
@given(st.lists(trees(), max_size=3), st.data())
def test_concat_and_subset_keep_the_sequences_they_are_given(forest, data):
    tree = PrefixTree.concat(forest)
    assert contents(tree) == [s for part in forest for s in contents(part)]
    assert keys_of(tree) == [k for part in forest for k in keys_of(part)]
    order = data.draw(st.permutations(range(tree.num_sequences)))
    kept = order[: data.draw(st.integers(0, len(order)))]
    part = tree.subset(kept)
    assert contents(part) == [contents(tree)[i] for i in kept]
    assert keys_of(part) == [keys_of(tree)[i] for i in kept]
    assert part.num_nodes == len({node for i in kept for node in tree.sequences[i]})
    assert part.multiplicity.sum() == sum(len(tree.sequences[i]) for i in kept)


@settings(max_examples=100, deadline=None)
@given(trees())
def test_merged_chains_are_the_same_sequences_in_fewer_nodes(tree):
    merged = tree.merge_chains()
    assert contents(merged) == contents(tree)
    assert keys_of(merged) == keys_of(tree)
    assert merged.grouped_tokens == tree.grouped_tokens
    ends = {path[-1] for path in merged.sequences}
    parents = [p for p in merged.parents if p >= 0]
    assert all(parents.count(n) != 1 or n in ends for n in range(merged.num_nodes))


def test_what_remains_of_a_group_with_one_response_is_one_node():
    tree = PrefixTree.from_groups([([1, 2], [[3], [4, 5]])])
    assert nodes(tree.subset([1])) == [[1, 2], [4, 5]]
    assert nodes(tree.subset([1]).merge_chains()) == [[1, 2, 4, 5]]
    assert tree.merge_chains() is tree


def test_tokens_are_copied_and_cannot_be_written_to():
    prefix = np.array([1, 2])
    tree = PrefixTree.from_groups([(prefix, [np.array([3])])])
    prefix[0] = 9
    assert tree.tokens[0][0] == 1
    with pytest.raises(ValueError, match="read-only"):
        tree.tokens[0][0] = 9
    tree.sequence_tokens(0)[0] = 9


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([([1], [[2]]), ([], [[2]])], "the prefix of group 1 is empty"),
        ([([1], [[2]]), ([1], [])], "group 1 has no responses"),
        ([([1], [[2], []])], "response 1 of group 0 is empty"),
        ([([1], [[2], [0.5]])], "response 1 of group 0 holds float64"),
        ([([1], [[[2]]])], "response 0 of group 0 is not a flat list"),
        ([([1, [2]], [[2]])], "the prefix of group 0 is not a flat list"),
        ([("text", [[2]])], "the prefix of group 0 is not a flat list"),
    ],
)
def test_a_bad_group_is_named(groups, message):
    with pytest.raises(ValueError, match=message):
        PrefixTree.from_groups(groups)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([[1, 2], []], "sequence 1 is empty; it needs at least 2"),
        ([[1]], "sequence 0 has 1 token; it needs at least 2"),
        ([[True, False]], "sequence 0 holds bool"),
    ],
)
def test_a_bad_sequence_is_named(sequences, message):
    with pytest.raises(ValueError, match=message):
        PrefixTree.from_sequences(sequences)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([[1, 2]], "keys: 1 lists for 2 of tokens"),
        ([[1, 2], [3]], "keys of sequence 1: 1 for 2 tokens"),
        ([[1, 2], [0.5, 1]], "keys of sequence 1 holds float64, keys are integers"),
    ],
)
def test_a_bad_key_is_named(keys, message):
    with pytest.raises(ValueError, match=message):
        PrefixTree.from_sequences([[1, 2], [1, 3]], keys=keys)


def test_a_bad_key_of_a_group_is_named():
    with pytest.raises(ValueError, match="keys of response 1 of group 0: 2 for 1 tokens"):
        PrefixTree.from_groups([([1, 2], [[3], [4]])], keys=[([0, 0], [[0], [0, 0]])])


def test_a_thousand_long_sequences_make_a_trie_quickly():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 1000, 3000) for _ in range(20)]
    sequences = [
        np.concatenate([prompts[i % 20], rng.integers(0, 1000, 1096)]) for i in range(1000)
    ]
    began = time.perf_counter()
    tree = PrefixTree.from_sequences(sequences)
    # Well below a second on an idle core; a loop over tokens would take many times as long.
    assert time.perf_counter() - began < 5
    assert tree.num_sequences == 1000
    # The first prompt token apart, prompts are shared by fifty each.
    assert tree.grouped_tokens < 20 * 3000 + 1000 * 1096
