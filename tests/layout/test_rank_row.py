"""A rank's row: the tokens that it holds, and the stages of the kinds that were asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.layout import COMM_TYPES, PackedLayout, PrefixTree, pack, rank_row
from tests.layout.invariants import visible_keys, visible_with_root
from tests.layout.strategies import trees, trees_below_a_root


def _layout(cp: int) -> PackedLayout:
    groups = [(list(range(50)), [list(range(20 + i)) for i in range(5)]), ([1, 2], [[3] * 9])]
    return pack(PrefixTree.from_groups(groups), pad_to_multiple=cp)


@settings(deadline=None, max_examples=60)
@given(tree=trees(max_nodes=14), cp=st.integers(1, 4), density=st.sampled_from([0.0, 0.2, 1.0]))
def test_the_ranks_hold_every_token_once_and_put_out_what_is_needed(
    tree: PrefixTree, cp: int, density: float
) -> None:
    layout = pack(tree, pad_to_multiple=cp)
    real = layout.num_tokens - layout.num_padding
    needed = np.flatnonzero(np.random.default_rng(0).random(real) < density)
    put_out = []
    for rank in range(cp):
        row = rank_row(layout, rank=rank, num_ranks=cp, needed=needed)
        own = row.rows >= 0
        for name, values in (("labels", row.labels), ("input_ids", row.model.input_ids)):
            np.testing.assert_array_equal(values[own], getattr(layout, name)[row.rows[own]])
            assert not values[~own].any()
        np.testing.assert_array_equal(
            row.model.position_ids[own], layout.position_ids[row.rows[own]]
        )
        put_out.append(row.rows[row.output_rows])
        stages = row.model.last_stages or row.model.stages
        assert stages.num_tokens == len(row.rows)
        assert stages.num_queries == len(row.output_rows) == stages.cu_seqlens_q[1]
    held = np.concatenate(put_out)
    assert np.isin(needed, held).all() and len(np.unique(held[held >= 0])) == (held >= 0).sum()


def test_a_trimmed_row_shows_each_query_the_keys_that_it_saw() -> None:
    layout = _layout(4)
    needed = np.array([60, 61, 130])
    row = rank_row(layout, needed=needed, multiple=4)
    assert len(row.output_rows) % 4 == 0 and np.isin(needed, row.output_rows).all()
    whole = visible_keys(layout.stages, layout.num_tokens)[row.output_rows]
    trimmed = visible_keys(row.model.last_stages.local, layout.num_tokens)[: len(row.output_rows)]
    np.testing.assert_array_equal(trimmed, whole)


@settings(deadline=None, max_examples=60)
@given(
    tree=trees_below_a_root(),
    multiple=st.integers(1, 4),
    density=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_a_trimmed_row_shows_each_query_the_root_that_is_elsewhere(
    tree: PrefixTree, multiple: int, density: float
) -> None:
    layout = pack(tree, root_elsewhere=True, pad_to_multiple=multiple)
    num_tokens, num_root = layout.num_tokens, int(tree.packed_lengths[0])
    needed = np.flatnonzero(np.random.default_rng(0).random(num_tokens) < density)
    row = rank_row(layout, needed=needed, multiple=multiple)
    assert np.isin(needed, row.output_rows).all()
    whole, trimmed = (
        visible_with_root(stages.local, stages.root, num_tokens=num_tokens, num_root=num_root)
        for stages in (row.model.stages, row.model.last_stages or row.model.stages)
    )
    np.testing.assert_array_equal(trimmed[: len(row.output_rows)], whole[row.output_rows])
    assert not trimmed[len(row.output_rows) :].any()


def test_a_row_whose_output_is_needed_everywhere_has_no_stages_of_a_last_layer() -> None:
    layout = _layout(1)
    row = rank_row(layout, needed=np.arange(layout.num_tokens))
    assert row.model.last_stages is None
    np.testing.assert_array_equal(row.output_rows, np.arange(layout.num_tokens))


@pytest.mark.parametrize("kind", COMM_TYPES)
def test_stages_of_other_kinds_of_communication_are_not_made(kind: str) -> None:
    stages = rank_row(_layout(2), num_ranks=2, comm_types=[kind]).model.stages
    made = {"all_gather": stages.gathered, "p2p": stages.ring, "a2a": stages.whole_row}
    # Latents are gathered and then attended to as keys and values are.
    expected = "all_gather" if kind == "latent_gather" else kind
    assert [name for name, found in made.items() if found is not None] == [expected]
