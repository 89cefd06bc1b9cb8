"""The dispatcher of context parallelism: places, balance and the stages that follow from them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.layout import ContextShards, PrefixTree, RankStages, pack, shard_layout
from tests.layout.invariants import assert_shards
from tests.layout.strategies import group_lists, trees


def _groups(*groups: tuple[int, list[int]]) -> PrefixTree:
    return PrefixTree.from_groups([([0] * p, [[0] * n for n in lengths]) for p, lengths in groups])


def _shards(tree: PrefixTree, cp: int, *, tp: int = 1) -> ContextShards:
    return shard_layout(pack(tree, pad_to_multiple=cp * tp), cp)


@settings(deadline=None, max_examples=150)
@given(tree=trees(max_nodes=14), cp=st.integers(1, 6), tp=st.sampled_from([1, 2]))
def test_any_forest_on_any_number_of_ranks(tree: PrefixTree, cp: int, tp: int) -> None:
    shards = _shards(tree, cp, tp=tp)
    assert_shards(shards)
    assert shards.tokens_per_rank % tp == 0


@settings(deadline=None, max_examples=100)
@given(groups=group_lists(max_tokens=30), cp=st.sampled_from([2, 3, 4, 8]))
def test_groups_of_any_lengths(groups: list, cp: int) -> None:
    assert_shards(_shards(PrefixTree.from_groups(groups), cp))


@pytest.mark.parametrize(
    "tree",
    [
        _groups((3, [9, 9, 9, 9])),  # a prefix of fewer tokens than chunks
        _groups((1, [9, 5])),  # a prefix that has no segment
        _groups((20, [4, 5, 150])),  # one response far longer than the rest
        _groups((31, [17, 5])),  # fewer responses than ranks
        _groups((60, [13])),  # one response
        _groups((29, [7] * 11), (3, [50, 2]), (1, [1]), (40, [90])),
        PrefixTree.from_sequences([[1] * 20 + [2] * 15 + [i] * 9 for i in range(3, 9)]),
    ],
)
@pytest.mark.parametrize("cp", [1, 2, 4, 8])
def test_shapes_that_do_not_divide(tree: PrefixTree, cp: int) -> None:
    assert_shards(_shards(tree, cp))


def test_one_rank_holds_everything_whole() -> None:
    shards = _shards(_groups((9, [3, 4])), 1)
    assert len(shards.sharded) == 0
    np.testing.assert_array_equal(RankStages(shards, 0).rows(), np.arange(15))


def test_responses_stay_whole_and_only_the_prefix_is_sharded() -> None:
    shards = _shards(_groups((4097, [512] * 8)), 4)
    assert [shards.layout.segments[i].length for i in shards.sharded] == [4096]
    # Early and late alike but for rounding: the zigzag.
    assert (abs(shards.early - 512) <= 1).all() and (abs(shards.late - 512) <= 1).all()
    assert np.bincount(shards.rank_of_segment[1:]).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("lengths", [[512] * 8, [1024] * 8, [512] * 16, [300, 700] * 4])
def test_what_travels_does_not_depend_on_whole_responses(lengths: list[int]) -> None:
    shards = _shards(_groups((8192, lengths)), 4)
    assert shards.shard_tokens.sum() == 8191


def test_groups_that_fit_a_rank_stay_whole_and_nothing_travels() -> None:
    shards = _shards(_groups(*[(2000, [500] * 8)] * 4), 4)
    assert shards.shard_tokens.sum() == 0
    assert shards.imbalance == 0


def test_a_response_beyond_its_fair_share_is_sharded() -> None:
    shards = _shards(_groups((2000, [100, 100, 30000, 100])), 4)
    lengths = sorted(shards.layout.segments[i].length for i in shards.sharded)
    assert lengths == [1999, 30000]


def _random_forests(rng: np.random.Generator) -> dict[str, PrefixTree]:
    def lengths(low: int, high: int, count: int) -> list[int]:
        return rng.integers(low, high, count).tolist()

    system, turns = [1] * 3000, [[2 + i] * 1500 for i in range(4)]
    return {
        "ragged responses": _groups((16000, lengths(100, 6000, 12))),
        "short prefix": _groups((500, lengths(100, 6000, 16))),
        "no prefix": _groups(*[(1, [n]) for n in lengths(500, 9000, 20)]),
        "many groups": _groups(*[(n, lengths(100, 2000, 8)) for n in lengths(200, 6000, 9)]),
        "one long response": _groups((9000, [200] * 15 + [30000])),
        "fewer responses than ranks": _groups((30000, [4000, 9000, 300])),
        "three levels": PrefixTree.from_sequences(
            system + turn + [20 + i] * int(rng.integers(200, 3000))
            for turn in turns
            for i in range(5)
        ),
    }


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_work_and_what_ranks_receive_are_even_and_padding_small(cp: int) -> None:
    rng = np.random.default_rng()
    for name, tree in _random_forests(rng).items():
        shards = _shards(tree, cp, tp=4)
        if shards.tokens_per_rank < 4096:
            continue
        # The promise is 5 %: the dispatcher aims at 2 and then rounds to tokens.
        assert shards.imbalance <= 0.025, (name, shards.imbalance)
        assert shards.layout.num_padding <= 0.02 * shards.layout.num_tokens, name
        travelling = int(shards.shard_tokens.sum())
        received = travelling - int(shards.shard_tokens.min())
        assert received <= 1.05 * (cp - 1) / cp * travelling + 1, name


def test_an_uneven_length_is_refused() -> None:
    layout = pack(_groups((4, [3, 3])), pad_to_multiple=3)
    with pytest.raises(ValueError, match="9 tokens does not divide by the 2 context-parallel"):
        shard_layout(layout, 2)
    with pytest.raises(ValueError, match="num_ranks=0"):
        shard_layout(layout, 0)


def test_the_summary_tells_different_rows_apart() -> None:
    summaries = {
        _shards(tree, 2).summary()
        for tree in (
            _groups((9, [3, 4])),
            _groups((9, [4, 3])),
            _groups((7, [3, 4]), (1, [2])),
            _groups((8, [3, 4])),
        )
    }
    assert len(summaries) == 4
    assert _shards(_groups((9, [3, 4])), 2).summary() in summaries
