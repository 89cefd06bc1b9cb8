"""A trimmed last layer: what is kept, and that each kept query sees the keys it saw before."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.layout import (
    PackedLayout,
    PrefixTree,
    RankStages,
    pack,
    rows_to_keep,
    shard_layout,
    trim_stages,
)
from megatron_prefix.layout.stages import stage_rows
from tests.layout.invariants import visible_keys
from tests.layout.strategies import trees


def _assert_trimmed(layout: PackedLayout, needed: np.ndarray, multiple: int) -> np.ndarray:
    kept = rows_to_keep(layout.stages[0], needed, multiple=multiple)
    assert kept[needed].all() and kept.sum() % multiple == 0 and kept.any()
    stages = trim_stages(layout.stages, kept)
    expected = visible_keys(layout.stages, layout.num_tokens)[kept]
    np.testing.assert_array_equal(visible_keys(stages, layout.num_tokens)[: kept.sum()], expected)
    first = stages[0]
    assert first.on.causal and not any(stage.on.causal for stage in stages[1:])
    assert first.queries == slice(0, kept.sum())
    return kept


@settings(deadline=None, max_examples=150)
@given(
    tree=trees(max_nodes=14),
    multiple=st.sampled_from([1, 2, 4]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_rows_of_any_forest(tree: PrefixTree, multiple: int, density: float, seed: int) -> None:
    layout = pack(tree, pad_to_multiple=multiple)
    needed = np.random.default_rng(seed).random(layout.num_tokens) < density
    _assert_trimmed(layout, needed, multiple)


@settings(deadline=None, max_examples=60)
@given(tree=trees(max_nodes=14), cp=st.integers(2, 4), seed=st.integers(0, 2**32 - 1))
def test_rows_of_each_context_parallel_rank(tree: PrefixTree, cp: int, seed: int) -> None:
    shards = shard_layout(pack(tree, pad_to_multiple=cp), cp)
    for rank in range(cp):
        stages = RankStages(shards, rank)
        needed = np.random.default_rng(seed).random(shards.tokens_per_rank) < 0.3
        kept = rows_to_keep(stages.local()[0], needed, multiple=1)
        for of_kind in (
            stages.local(),
            stages.from_all_shards().stages,
            *(stages.from_shard(other) for other in range(cp)),
        ):
            size = max(
                [shards.tokens_per_rank, *(stage_rows(stage.keys)[-1] + 1 for stage in of_kind)]
            )
            before = visible_keys(of_kind, size)[: len(kept)][kept]
            after = visible_keys(trim_stages(of_kind, kept), size)[: kept.sum()]
            np.testing.assert_array_equal(after, before)


def test_of_a_group_only_the_responses_are_kept_and_nothing_is_copied() -> None:
    layout = pack(PrefixTree.from_groups([([0] * 20, [[0] * 5, [0] * 7])]))
    needed = np.arange(layout.num_tokens) >= 19
    kept = _assert_trimmed(layout, needed, 1)
    np.testing.assert_array_equal(kept, needed)
    self_stage, prefix_stage = trim_stages(layout.stages, kept)
    assert self_stage.keys == slice(19, 31)
    assert prefix_stage.keys == slice(0, 19)


def test_a_sequence_that_shares_nothing_is_divided_where_training_begins() -> None:
    layout = pack(PrefixTree.from_sequences([[0] * 31]))
    kept = _assert_trimmed(layout, np.arange(30) == 20, 1)
    assert kept.tolist() == [False] * 20 + [True] * 10


@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_filling_up_takes_rows_right_before_the_kept_ones(multiple: int) -> None:
    layout = pack(PrefixTree.from_groups([([0] * 20, [[0] * 5, [0] * 6])]), pad_to_multiple=8)
    needed = np.zeros(layout.num_tokens, dtype=bool)
    needed[[22, 27]] = True
    kept = _assert_trimmed(layout, needed, multiple)
    assert kept.sum() == -(-5 // multiple) * multiple


def test_a_row_without_any_needed_rows_keeps_as_few_as_it_may() -> None:
    layout = pack(PrefixTree.from_groups([([0] * 20, [[0] * 5])]), pad_to_multiple=4)
    kept = _assert_trimmed(layout, np.zeros(layout.num_tokens, dtype=bool), 4)
    assert kept.sum() == 4
