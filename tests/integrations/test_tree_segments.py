"""Rows described as trees of segments, run by our layers."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from hypothesis import given

from megatron_prefix.integrations.tree_segments import TreeSegments
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layout import PrefixTree, pack
from tests.layout.strategies import trees
from tests.megatron.models import (
    ON_CPU,
    model_config,
    model_pair,
    relative_error,
    sequence_logits,
    single_process,
)

ROW = TreeSegments(
    starts=(0, 12, 20, 24), lengths=(12, 8, 4, 8), parents=(-1, 0, 1, 0), depths=(0, 12, 20, 12)
)
"""A root with a child that has a child, and another child."""


def _as_params(segments: TreeSegments) -> types.SimpleNamespace:
    """What has a `TreePackedSeqParams`' fields; no release of Megatron-Core has the class."""
    return types.SimpleNamespace(**segments.fields("cpu"))


def test_a_described_row_gives_each_segment_what_its_path_gives() -> None:
    segments = TreeSegments.of_params(_as_params(ROW))
    layout, order = segments.layout()
    tokens = torch.from_numpy(np.random.default_rng().integers(0, 61, segments.num_tokens))
    with single_process():
        reference, grouped = model_pair(model_config())
        params = PrefixPackedSeqParams.from_layout(layout, ON_CPU)
        logits = grouped(
            tokens[order][None], params.position_ids[None], None, packed_seq_params=params
        )
        found = torch.empty_like(logits[0])
        found[order] = logits[0]
        for segment, path in enumerate([[0], [0, 1], [0, 1, 2], [0, 3]]):
            rows = [slice(ROW.starts[s], ROW.starts[s] + ROW.lengths[s]) for s in path]
            # The last token is no input there.
            whole = np.concatenate([*(tokens[r].numpy() for r in rows), [0]])
            expected = sequence_logits(reference, whole)[-ROW.lengths[segment] :]
            assert relative_error(found[rows[-1]], expected) <= 1e-12


@given(trees())
def test_a_layout_described_and_taken_back_sees_the_same(tree: PrefixTree) -> None:
    layout = pack(tree, pad_to_multiple=4)
    segments, order = TreeSegments.of_layout(layout)
    assert sorted(order.tolist()) == list(range(layout.num_tokens))
    described = segments.fields("cpu")
    assert described["tree_local_position_ids"].tolist() == layout.position_ids[order].tolist() or (
        layout.num_padding  # which has no positions there
    )
    back, back_order = TreeSegments.of_params(_as_params(segments)).layout()
    assert back.num_tokens == layout.num_tokens
    there = order[back_order]
    assert np.array_equal(_sees(back), _sees(layout)[np.ix_(there, there)])


def _sees(layout: object) -> np.ndarray:
    """[T, T] whether a token sees another, by brute force from the segments."""
    found = np.zeros((layout.num_tokens, layout.num_tokens), dtype=bool)
    for segment in layout.segments:
        own = range(segment.start, segment.start + segment.length)
        for row in own:
            found[row, segment.start : row + 1] = True
        above = segment.parent
        while above >= 0:
            other = layout.segments[above]
            found[own.start : own.stop, other.start : other.start + other.length] = True
            above = other.parent
    real = layout.num_tokens - layout.num_padding
    found[real:, real:] = np.tri(layout.num_padding, dtype=bool)
    return found


def test_segments_of_no_row_and_cut_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="segment 1 has start 2, length 1, parent 0 and depth 1"):
        TreeSegments(starts=(0, 2), lengths=(1, 1), parents=(-1, 0), depths=(0, 1))
    params = _as_params(ROW)
    params.tree_cp_local_token_count = 16
    with pytest.raises(ValueError, match="tree_cp_local_token_count=16 of 32 tokens"):
        TreeSegments.of_params(params)
