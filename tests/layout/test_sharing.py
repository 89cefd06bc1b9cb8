from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.layout import (
    GroupSlice,
    ModelShape,
    Packing,
    PrefixTree,
    pack,
    share_where_it_pays,
    trained_labels,
)

from .strategies import SEVEN_B, SHAPE, trees

SMALL = ModelShape(
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=688,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=32,
    vocab_size=512,
    gated_linear_unit=True,
)


def group(prefix: int, *responses: int) -> PrefixTree:
    return PrefixTree.from_groups([([0] * prefix, [[1 + i] * n for i, n in enumerate(responses)])])


def assert_same_sequences(tree: PrefixTree, other: PrefixTree) -> None:
    assert tree.num_sequences == other.num_sequences
    for i in range(tree.num_sequences):
        assert np.array_equal(tree.sequence_tokens(i), other.sequence_tokens(i))


@pytest.mark.parametrize("shape", [SMALL, SEVEN_B])
@pytest.mark.parametrize("responses", [(32, 32), (512,) * 8, (2048,) * 16])
def test_a_prefix_of_a_few_tokens_is_not_shared(shape, responses):
    for prefix in (1, 2, 4):
        tree = share_where_it_pays(group(prefix, *responses), shape)
        assert tree.num_nodes == len(responses)
        assert set(tree.parents) == {-1}


@pytest.mark.parametrize("shape", [SMALL, SEVEN_B])
@pytest.mark.parametrize("responses", [(32, 32), (512,) * 8, (2048,) * 16, (5, 900)])
def test_a_long_prefix_is_shared(shape, responses):
    tree = group(2048, *responses)
    assert share_where_it_pays(tree, shape) is tree


def test_a_group_of_one_is_one_causal_square():
    tree = share_where_it_pays(group(500, 40), SMALL).merge_chains()
    assert tree.num_nodes == 1
    assert len(pack(tree).stages) == 1


def test_the_longer_the_responses_the_more_a_prefix_must_save():
    def shared(prefix: int, response: int) -> bool:
        return share_where_it_pays(group(prefix, response, response), SMALL).num_nodes == 3

    shortest = [
        next(prefix for prefix in range(1, 1000) if shared(prefix, response))
        for response in (16, 128, 1024)
    ]
    assert shortest == sorted(shortest)
    assert shortest[0] < shortest[-1]


def test_each_run_is_decided_for_itself():
    # A system prompt of 3 tokens over two groups of long prompts, and the other way round.
    def groups(system: int, prompt: int) -> PrefixTree:
        return PrefixTree.from_sequences(
            [0] * system + [1 + g] * prompt + [9 + r] * 20 for g in range(2) for r in range(4)
        )

    few = share_where_it_pays(groups(3, 400), SMALL)
    assert few.num_nodes == 2 + 8
    assert sorted(few.node_lengths.tolist())[-2:] == [403, 403]
    many = share_where_it_pays(groups(400, 1), SMALL)
    assert many.num_nodes == 1 + 8


def test_sequences_that_end_where_others_go_on_stay_what_they_are():
    tree = PrefixTree.from_sequences([[1, 2], [1, 2, 3, 4], [1, 2, 5, 6, 7], [1, 2]])
    apart = tree.without({0})
    assert_same_sequences(apart, tree)
    assert apart.num_nodes == 3
    assert apart.parents == (-1, -1, -1)


@settings(max_examples=150, deadline=None)
@given(trees(), st.randoms(use_true_random=False))
def test_not_sharing_any_nodes_keeps_the_sequences(tree, random):
    nodes = {node for node in range(tree.num_nodes) if random.random() < 0.5}
    apart = tree.without(nodes)
    assert_same_sequences(apart, tree)
    assert apart.ungrouped_tokens == tree.ungrouped_tokens
    assert tree.grouped_tokens <= apart.grouped_tokens <= tree.ungrouped_tokens


@settings(max_examples=100, deadline=None)
@given(trees())
def test_a_row_never_outgrows_its_budget(tree):
    if tree.num_nodes:
        decided = share_where_it_pays(tree, SHAPE, token_budget=tree.grouped_tokens)
        assert decided.grouped_tokens == tree.grouped_tokens
        assert_same_sequences(decided, tree)


def packing_of(
    *, token_budget: int, share_only_where_it_pays: bool = True, sharing: str = "groups"
) -> Packing:
    return Packing(
        token_budget=token_budget,
        data_parallel_size=1,
        model_shape=SMALL,
        pad_to_multiple=1,
        microbatch_multiple=1,
        allow_split=True,
        sharing=sharing,
        trim_last_layer=True,
        share_only_where_it_pays=share_only_where_it_pays,
        share_across_microbatches=False,
    )


def test_groups_that_are_not_shared_are_split_like_any_sequences():
    packing = packing_of(token_budget=125)
    trees_ = [packing.group(group(2, 30, 30, 30, 30)), packing.group(group(100, 10, 10))]
    labels = [tree.packed_lengths for tree in trees_]
    for rank in packing.plan(trees_, labels=labels).microbatches:
        for slices in rank:
            assert packing.microbatch(trees_, slices).grouped_tokens <= 125


def packed(packing: Packing, *groups: PrefixTree) -> PrefixTree:
    """One microbatch of whole groups, as they are planned."""
    trees_ = [packing.group(tree) for tree in groups]
    slices = [
        GroupSlice(group=i, sequences=tuple(range(tree.num_sequences)))
        for i, tree in enumerate(trees_)
    ]
    tree = packing.microbatch(trees_, slices)
    assert_same_sequences(tree, PrefixTree.concat(groups))
    assert tree.grouped_tokens <= sum(t.grouped_tokens for t in trees_)
    return tree


@pytest.mark.parametrize("only_where_it_pays", [True, False])
def test_responses_of_a_group_share_the_turns_that_they_agree_in(only_where_it_pays):
    def dialogues(*turns: list[int]) -> PrefixTree:
        return PrefixTree.from_groups([([0] * 50, turns)])

    first, tool = [1] * 40, [2] * 30
    branching = dialogues(
        first + tool + [3] * 20, first + tool + [4] * 15, first + [5] * 25, [6] * 9
    )
    packing = packing_of(token_budget=1000, share_only_where_it_pays=only_where_it_pays)
    tree = packed(packing, branching, branching)
    # Groups are told apart: they share nothing with each other, although they are the same.
    assert tree.grouped_tokens == 2 * (49 + 40 + 30 + 20 + 15 + 25 + 9)
    assert sorted(tree.multiplicity.tolist()) == sorted(2 * [4, 3, 2, 1, 1, 1, 1])
    # A prompt that is planned as a part of each response may pay once turns are shared with it.
    short = PrefixTree.from_groups([([0] * 2, [first + [3] * 9, first + [4] * 9])])
    assert packed(packing, short).grouped_tokens == 1 + 40 + 9 + 9


@pytest.mark.parametrize("only_where_it_pays", [True, False])
def test_responses_that_begin_with_the_same_few_words_share_the_prompt_only(only_where_it_pays):
    tree = PrefixTree.from_groups([([0] * 90, [[7, 8] + [i] * 30 for i in range(4)])])
    packing = packing_of(token_budget=1000, share_only_where_it_pays=only_where_it_pays)
    assert packed(packing, tree).parents == (-1, 0, 0, 0, 0)


def test_identical_responses_are_computed_once():
    tree = PrefixTree.from_groups([([0] * 90, [[7] * 60, [8] * 30, [7] * 60])])
    found = packed(packing_of(token_budget=1000), tree)
    assert found.grouped_tokens == 89 + 60 + 30
    assert found.sequences[0] == found.sequences[2]


def test_turns_and_prompts_of_other_keys_are_not_shared():
    prompt, image, words = [0] * 50, [9] * 40, [5] * 10
    responses = [[*image, *words], [*image, *words], [*image, 6]]
    # The first two show one image, the third another.
    keys = [[*range(40), *[0] * len(response[40:])] for response in responses]
    keys[2][:40] = range(100, 140)
    groups = [(prompt, responses)]
    packing = packing_of(token_budget=1000)
    seen = PrefixTree.from_groups(groups, keys=[([0] * 50, keys)])
    assert packed(packing, seen).grouped_tokens == 49 + (40 + 10) + (40 + 1)
    assert packed(packing, PrefixTree.from_groups(groups)).grouped_tokens == 49 + 40 + 10 + 1
    # Two groups of one prompt share it, unless it shows another image.
    other = PrefixTree.from_groups(groups, keys=[([7] * 50, keys)])
    everything = packing_of(token_budget=1000, sharing="everything")
    assert packed(everything, seen, seen).grouped_tokens == 49 + 50 + 41
    assert packed(everything, seen, other).grouped_tokens == 2 * (49 + 50 + 41)


def test_labels_follow_the_trained_tokens_whether_shared_or_not():
    tree = group(5, 3, 4)
    assert trained_labels(tree, [5, 5]).tolist() == [0, 3, 4]
    assert trained_labels(tree.without({0}), [5, 5]).tolist() == [3, 4]
    # Trained from the second prompt token on: shared positions are labels once.
    assert trained_labels(tree, [1, 1]).tolist() == [4, 3, 4]
