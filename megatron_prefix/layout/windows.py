"""The attention of a layer with a sliding window: one stage, with a halo before each segment.

A query sees its own key and the `window` keys right before it on its path. A segment's keys are
therefore its own, and before them its halo: the last `window` rows of the path above it, which may
lie in several short segments.

    path above   . . . . . h h h | own          keys of the rectangle: h h h, then own
                           halo  |              queries: own

Several segments may have the same row in their halos, so keys are copies, and the gradients of a
row's copies are added up. Whatever the length of the prefix, a segment has at most `window` rows of
it. A window that no sequence of the row is longer than hides nothing: the stages are then those of
the other layers, which copy nothing.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_prefix.layout.packing import PackedLayout
from megatron_prefix.layout.rows import RowStages
from megatron_prefix.layout.stages import AttentionStage, Copies, attention_stage


def windowed_stages(
    layout: PackedLayout, stages: RowStages[np.ndarray], window: int
) -> tuple[AttentionStage[np.ndarray], ...]:
    """The stages of a layer in which a query sees `window` keys before its own at most.

    Args:
        layout: the whole row, with its roots.
        stages: of this row in layers without a window. In a trimmed last layer the queries of a
            segment are its last ones.
        window: at least 0.
    """
    if layout.max_seqlen <= window + 1:
        return stages.local
    rows = np.arange(layout.num_tokens)
    queries = rows if stages.queries is None else stages.queries
    keys, q_lengths, k_lengths = [], [], []
    for start, stop, parent in _segments(layout):
        num_queries = int(np.searchsorted(queries, stop) - np.searchsorted(queries, start))
        if num_queries:
            first = stop - num_queries
            halo = _rows_before(layout, first, start, parent, window)
            keys += [*halo, rows[first:stop]]
            q_lengths.append(num_queries)
            k_lengths.append(num_queries + sum(map(len, halo)))
    key_rows = np.concatenate(keys)
    if len(key_rows) == layout.num_tokens == len(queries):  # no halo, no query left out
        key_rows, copies = slice(0, layout.num_tokens), None
    else:
        copies = _copies(key_rows, layout.num_tokens)
    stage = attention_stage(
        slice(0, len(queries)), key_rows, np.array(q_lengths), np.array(k_lengths), causal=True
    )
    on = dataclasses.replace(stage.on, window=window)
    return (dataclasses.replace(stage, on=on, copies=copies),)


def _segments(layout: PackedLayout) -> list[tuple[int, int, int]]:
    """First row, row behind the last one, and parent (-1: none); padding is the last segment."""
    segments = [(s.start, s.start + s.length, s.parent) for s in layout.segments]
    if layout.num_padding:
        segments.append((layout.num_tokens - layout.num_padding, layout.num_tokens, -1))
    return segments


def _rows_before(
    layout: PackedLayout, row: int, start: int, parent: int, window: int
) -> list[np.ndarray]:
    """The last `window` rows on the path before `row`, or all there are, in order.

    Args:
        row: of a segment that begins at `start` below the segment `parent`.
    """
    parts = [np.arange(max(start, row - window), row)]
    missing = window - len(parts[0])
    while missing and parent >= 0:
        above = layout.segments[parent]
        stop = above.start + above.length
        parts.append(np.arange(max(above.start, stop - missing), stop))
        missing -= len(parts[-1])
        parent = above.parent
    return parts[::-1]


def _copies(key_rows: np.ndarray, num_rows: int) -> Copies[np.ndarray]:
    counts = np.bincount(key_rows, minlength=num_rows)
    return Copies(order=np.argsort(key_rows, kind="stable"), bounds=np.append(0, np.cumsum(counts)))
