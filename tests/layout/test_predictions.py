"""Rows of other shifts, and how rows move from one to the next."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.layout import PrefixTree, own_values, pack
from megatron_prefix.layout.predictions import (
    DepthPlan,
    copied_rows,
    plan_depths,
    shifted_layouts,
)

from .invariants import assert_layout
from .strategies import trees


def test_the_end_of_a_prompt_is_there_once_for_each_token_that_it_predicts() -> None:
    tree = PrefixTree.from_groups([([1, 2, 3], [[4, 5], [6]])])
    first, second, third = shifted_layouts(pack(tree), 2)
    assert second.labels.tolist() == [3, 4, 5, 6, 0]
    assert second.position_ids.tolist() == [0, 1, 2, 1, 0]
    assert third.labels.tolist() == [4, 5, 6, 0, 0]
    assert third.position_ids.tolist() == [0, 1, 0, 0, 0]
    # Position 1, in the prompt, has the labels 4 and 6 behind it.
    assert copied_rows(first, second)[:4].tolist() == [0, 1, 2, 1]
    assert copied_rows(second, third)[:3].tolist() == [0, 1, 0]


@settings(deadline=None, max_examples=50)
@given(trees(), st.integers(1, 4))
def test_rows_of_every_shift_are_layouts_and_take_the_same_position_of_their_path(
    tree: PrefixTree, depths: int
) -> None:
    layouts = shifted_layouts(pack(tree), depths)
    for layout, following in itertools.pairwise(layouts):
        assert_layout(following)
        source = copied_rows(layout, following)
        for i in range(tree.num_sequences):
            rows = following.sequence_positions(i)
            before = layout.sequence_positions(i)
            np.testing.assert_array_equal(source[rows], before[: len(rows)])


def _moved(plans: list[DepthPlan], values: list[np.ndarray]) -> list[np.ndarray]:
    """What every rank has after its moves, from what every rank has."""
    parcels = [
        np.split(own[plan.moves.send], np.cumsum(plan.moves.sent)[:-1])
        for plan, own in zip(plans, values, strict=True)
    ]
    found = []
    for rank, plan in enumerate(plans):
        received = [of_rank[rank] for of_rank in parcels]
        assert [len(rows) for rows in received] == list(plan.moves.received)
        found.append(np.concatenate(received)[plan.moves.take])
    return found


@settings(deadline=None, max_examples=25)
@given(trees(), st.integers(1, 3), st.sampled_from([2, 3]))
def test_ranks_send_each_other_what_the_whole_row_moves(
    tree: PrefixTree, depths: int, num_ranks: int
) -> None:
    layouts = shifted_layouts(pack(tree, pad_to_multiple=2 * num_ranks), depths)
    of_ranks = [plan_depths(layouts, rank=r, num_ranks=num_ranks) for r in range(num_ranks)]
    for depth, (layout, following) in enumerate(itertools.pairwise(layouts)):
        plans = [of_rank[depth] for of_rank in of_ranks]
        values = np.arange(layout.num_tokens) + 1
        moved = _moved(plans, [own_values(values, plan.row.rows) for plan in plans])
        whole = values[copied_rows(layout, following)]
        for plan, own in zip(plans, moved, strict=True):
            rows = plan.following.rows
            real = rows[(rows >= 0)]
            real = real[real < following.num_tokens - following.num_padding]
            np.testing.assert_array_equal(own[: len(real)], whole[real])
            np.testing.assert_array_equal(
                plan.following.labels[: len(real)], following.labels[real]
            )
