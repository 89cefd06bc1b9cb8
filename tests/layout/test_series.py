"""Pieces of a large group follow one another on a rank and run their root once, where it pays."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.layout import GroupSlice, MicrobatchPlan, TreeShape, plan_microbatches, rows_of
from megatron_prefix.layout.padding import padded_tokens
from megatron_prefix.layout.tree_cost import tree_flops

from .strategies import SHAPE


def _plan(groups: list[TreeShape], **options: int) -> tuple[MicrobatchPlan, MicrobatchPlan]:
    """The same groups planned with series allowed, and without."""
    options = {"data_parallel_size": 1, **options}
    return tuple(
        plan_microbatches(groups, cost=SHAPE, share_across_microbatches=share, **options)
        for share in (True, False)
    )


def _parts(plan: MicrobatchPlan) -> list[tuple[tuple[int, ...], ...]]:
    return [s.parts for rank in plan.microbatches for slices in rank for s in slices if s.parts]


def test_one_rank_runs_the_prefix_of_a_large_group_once() -> None:
    group = TreeShape.of_group(41, [5] * 64)
    plan, without = _plan([group], token_budget=80)
    assert plan.num_microbatches == 1 and without.num_microbatches == 8
    (parts,) = _parts(plan)
    assert [len(part) for part in parts] == [8] * 8
    assert sorted(i for part in parts for i in part) == list(range(64))
    # The prefix's 40 positions are counted once, not eight times.
    assert without.packed_tokens.sum() - plan.packed_tokens.sum() == 7 * 40
    assert plan.flops.sum() == tree_flops(SHAPE, group)


def test_several_ranks_have_a_series_each() -> None:
    plan, without = _plan([TreeShape.of_group(41, [5] * 64)], token_budget=80, data_parallel_size=2)
    assert [len(parts) for parts in _parts(plan)] == [4, 4]
    assert plan.flops.sum(axis=1).max() < without.flops.sum(axis=1).max()


def test_a_series_may_be_a_little_more_than_a_ranks_part() -> None:
    groups = [TreeShape.of_group(41, [5] * n) for n in (33, 31)]
    plan, without = _plan(groups, token_budget=80, data_parallel_size=2)
    assert plan.num_microbatches == 1 and len(_parts(plan)) == 2
    assert plan.flops.sum() == sum(tree_flops(SHAPE, group) for group in groups)
    assert plan.flops.sum(axis=1).max() < without.flops.sum(axis=1).max()


def test_as_many_ranks_as_pieces_leave_nothing_to_share() -> None:
    plan, without = _plan([TreeShape.of_group(41, [5] * 64)], token_budget=80, data_parallel_size=8)
    assert plan == without and not _parts(plan)


def test_a_response_that_fits_exactly_has_a_row_of_its_own() -> None:
    # 40 positions of the prefix, and 30 that are left.
    plan, _ = _plan([TreeShape.of_group(41, [30, 29, 1, 30, 28])], token_budget=70)
    (parts,) = _parts(plan)
    assert sorted(parts) == [(0,), (1, 2), (3,), (4,)]


def test_a_unit_of_separate_sequences_is_no_series() -> None:
    """As a group is planned whose prefix does not pay for its sharing."""
    separate = TreeShape.concat(TreeShape.of_group(41, [5] * 64).separate())
    plan, without = _plan([separate], token_budget=80)
    assert plan == without and not _parts(plan)


def test_groups_that_fit_and_series_are_planned_together() -> None:
    groups = [TreeShape.of_group(p, r) for p, r in ((41, [5] * 40), (9, [4, 5]), (30, [9, 3]))]
    plan, without = _plan(groups, token_budget=80)
    assert len(_parts(plan)) == 1
    assert [s.group for slices in plan.microbatches[0] for s in slices if not s.parts] == [1, 2]
    assert plan.flops.sum() < without.flops.sum()


def test_what_follows_what_is_part_of_the_fingerprint() -> None:
    plan, _ = _plan([TreeShape.of_group(41, [5] * 64)], token_budget=80)
    (series,) = plan.microbatches[0][0]
    prints = {
        dataclasses.replace(
            plan, microbatches=(((dataclasses.replace(series, parts=parts),),),)
        ).fingerprint()
        for parts in (series.parts, series.parts[::-1], ())
    }
    assert len(prints) == 3


@pytest.mark.parametrize("prefix", [1, 2])
def test_a_short_prefix_is_not_worth_a_busier_rank(prefix: int) -> None:
    groups = [TreeShape.of_group(prefix, [5] * 30), TreeShape.of_group(prefix, [5] * 14)]
    plan, without = _plan(groups, token_budget=40, data_parallel_size=2)
    assert plan.flops.sum(axis=1).max() <= without.flops.sum(axis=1).max()
    if prefix == 1:  # nothing to keep
        assert plan == without


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.lists(st.integers(1, 9), min_size=1, max_size=20)),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 20),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_any_groups_are_whole_within_the_budget_and_no_rank_is_busier(
    lengths: list[tuple[int, list[int]]], extra: int, ranks: int, multiple: int
) -> None:
    groups = [TreeShape.of_group(prefix, responses) for prefix, responses in lengths]
    budget = max(prefix + max(r) - 1 for prefix, r in lengths) + extra + multiple - 1
    plan, without = _plan(
        groups, token_budget=budget, data_parallel_size=ranks, pad_to_multiple=multiple
    )
    placed = [
        (s.group, i)
        for rank in plan.microbatches
        for slices in rank
        for s in slices
        for i in s.sequences
    ]
    assert sorted(placed) == [(g, i) for g, t in enumerate(groups) for i in range(t.num_sequences)]
    assert plan.flops.sum(axis=1).max() <= without.flops.sum(axis=1).max()
    assert {len(rank) for rank in plan.microbatches} == {plan.num_microbatches}
    assert plan.packed_tokens.tolist() == [
        [_tokens(groups, slices, multiple) for slices in rank] for rank in plan.microbatches
    ]
    for slices in (slices for rank in plan.microbatches for slices in rank):
        for found in slices:
            if not found.parts:
                continue
            assert len(slices) == 1 and len(found.parts) > 1
            assert sorted(i for part in found.parts for i in part) == list(found.sequences)
            group = groups[found.group]
            for part in found.parts:
                assert group.subset(part).grouped_tokens <= budget - budget % multiple


def _tokens(groups: list[TreeShape], slices: tuple[GroupSlice, ...], multiple: int) -> int:
    """Of all rows of a microbatch, padding included."""
    rows = [
        sum(groups[s.group].subset(s.sequences).grouped_tokens for s in r) for r in rows_of(slices)
    ]
    if any(s.parts for s in slices):
        root = int(groups[slices[0].group].packed_lengths[0])
        rows = [root, *(row - root for row in rows)]
    return sum(padded_tokens(row, multiple) for row in rows)
