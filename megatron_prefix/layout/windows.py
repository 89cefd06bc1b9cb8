"""The attention of a layer with a sliding window: one stage, with a halo before each run of tokens.

A query sees its own key and the `window` keys right before it on its path. The keys of a segment,
or of a rank's chunk of it, are therefore its own, and before them its halo: the last `window` rows
of the path above it, which may lie in several short segments.

    path above   . . . . . h h h | own          keys of the rectangle: h h h, then own
                           halo  |              queries: own

Several segments may have the same row in their halos, so keys are copies, and the gradients of a
row's copies are added up. Whatever the length of the prefix, a segment has at most `window` rows of
it. A window that no sequence of the row is longer than hides nothing: nothing is planned then, and
the layer has the stages of the others.

In a series of rows the halo of a row with responses reaches into the root, which an earlier row has
run: the last rows of its keys come behind the row's own.

Under context parallelism a rank asks other ranks for the rows of its halos that it does not hold,
each once, whatever the kind of communication. Every rank plans for all, so none has to ask.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_prefix.layout.packing import PackedLayout
from megatron_prefix.layout.rows import RowStages
from megatron_prefix.layout.shard_stages import RankStages
from megatron_prefix.layout.sharding import ContextShards
from megatron_prefix.layout.stages import (
    AttentionStage,
    Copies,
    HaloRows,
    WindowedStages,
    attention_stage,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class RankRows:
    """What one rank holds of a packed row: all of it, where there is one rank."""

    rows: np.ndarray
    """[C] int64: position in the packed row of each token; -1 on padding that has been moved."""
    bounds: np.ndarray
    """[runs + 1]: the rank's tokens bounds[i]:bounds[i + 1] are neighbours in one segment, or are
    padding."""

    @classmethod
    def of_row(cls, layout: PackedLayout) -> RankRows:
        """All of a row, on one rank."""
        # Squares of the self stage: segments, and padding.
        return cls(rows=np.arange(layout.num_tokens), bounds=layout.stages[0].on.cu_q)

    @classmethod
    def of_ranks(cls, shards: ContextShards) -> list[RankRows]:
        """[ranks] what each of the ranks holds that a row is distributed over."""
        ranks = [RankStages(shards, rank) for rank in range(shards.num_ranks)]
        # The squares of a rank's self stage are such runs.
        return [cls(rows=of.rows(), bounds=of.local()[0].on.cu_q) for of in ranks]


def windowed_stages(
    layout: PackedLayout,
    ranks: Sequence[RankRows],
    rank: int,
    window: int,
    *,
    layers: Sequence[RowStages[np.ndarray]],
) -> list[WindowedStages[np.ndarray] | None]:
    """The attention of layers in which a query sees `window` keys before its own at most.

    Args:
        layout: the whole row.
        ranks: what every rank holds.
        rank: whose stages are planned.
        window: at least 0.
        layers: the stages without a window, of all tokens and, where there is one, of the trimmed
            last layer, in which the queries of a run are its last ones.

    Returns:
        One for each of `layers`; None where the window hides nothing.
    """
    if layout.max_seqlen <= window + 1:
        return [None] * len(layers)
    own = ranks[rank]
    num_root = num_root_positions(layout)
    elsewhere = last_root_positions(layout, window)
    place = np.full(layout.num_tokens + num_root, -1, dtype=np.int64)
    place[own.rows[own.rows >= 0]] = np.flatnonzero(own.rows >= 0)
    halo, root_rows = None, len(elsewhere)
    if len(ranks) > 1:
        assert num_root == 0, "no series of rows with context parallelism"
        halo, elsewhere = exchanged_halo(layout, ranks, rank, window, place)
    num_keys = len(own.rows) + len(elsewhere)
    place[elsewhere] = np.arange(len(own.rows), num_keys)
    return [
        WindowedStages(
            stage=_stage(layout, own, layer, window, place, num_keys),
            halo=halo,
            root_rows=root_rows,
        )
        for layer in layers
    ]


def _stage(
    layout: PackedLayout,
    own: RankRows,
    layer: RowStages[np.ndarray],
    window: int,
    place: np.ndarray,
    num_keys: int,
) -> AttentionStage[np.ndarray]:
    """Of a layer's queries, against the row's keys and those from elsewhere behind them.

    Args:
        place: of each position of the packed row, and of the root, among these keys.
    """
    tokens = np.arange(len(own.rows))
    queries = tokens if layer.queries is None else layer.queries
    keys, q_lengths, k_lengths = [], [], []
    for start, stop in itertools.pairwise(own.bounds.tolist()):
        num_queries = int(np.searchsorted(queries, stop) - np.searchsorted(queries, start))
        if num_queries:
            first = stop - num_queries
            before = tokens[max(start, first - window) : first]
            above = rows_before(layout, int(own.rows[start]), window - len(before))
            keys += [place[above], before, tokens[first:stop]]
            q_lengths.append(num_queries)
            k_lengths.append(num_queries + len(before) + len(above))
    key_rows = np.concatenate(keys)
    assert (key_rows >= 0).all()
    if len(key_rows) == len(queries) == num_keys:  # no halo, no query left out
        key_rows, copies = slice(0, num_keys), None
    else:
        copies = _copies(key_rows, num_keys)
    stage = attention_stage(
        slice(0, len(queries)), key_rows, np.array(q_lengths), np.array(k_lengths), causal=True
    )
    on = dataclasses.replace(stage.on, window=window)
    return dataclasses.replace(stage, on=on, copies=copies)


def exchanged_halo(
    layout: PackedLayout, ranks: Sequence[RankRows], rank: int, window: int, place: np.ndarray
) -> tuple[HaloRows[np.ndarray] | None, np.ndarray]:
    """What this rank sends and receives (None: no rank does), and the positions it receives.

    Args:
        window: rows of the path before a run that its halo has.
        place: of each position of the packed row in the rank's.
    """
    asked = positions_asked_for(layout, ranks, window)
    if not any(len(positions) for of_rank in asked for positions in of_rank):
        return None, np.zeros(0, dtype=np.int64)
    sent = [asked[peer][rank] for peer in range(len(ranks))]
    rows = place[np.concatenate(sent)]
    halo = HaloRows(
        rows=rows,
        sent=tuple(map(len, sent)),
        received=tuple(map(len, asked[rank])),
        copies=_copies(rows, len(ranks[rank].rows)),
    )
    return halo, np.concatenate(asked[rank])


def positions_asked_for(
    layout: PackedLayout, ranks: Sequence[RankRows], window: int
) -> list[list[np.ndarray]]:
    """[receiver][sender] positions, ascending, of the rows that a rank's halos need of another."""
    owner = np.full(layout.num_tokens, -1, dtype=np.int64)
    for rank, held in enumerate(ranks):
        owner[held.rows[held.rows >= 0]] = rank
    asked = []
    for rank, held in enumerate(ranks):
        above = [rows_before(layout, int(p), window) for p in held.rows[held.bounds[:-1]]]
        needed = np.unique(np.concatenate(above))
        needed = needed[owner[needed] != rank]
        asked.append([needed[owner[needed] == sender] for sender in range(len(ranks))])
    return asked


def rows_before(layout: PackedLayout, position: int, count: int) -> np.ndarray:
    """The last `count` positions on the path before `position`, or all there are, in order.

    Those of a root that is elsewhere are counted on from the row's own.
    """
    segments = layout.segments
    if not 0 <= position < layout.num_tokens - layout.num_padding:
        return np.zeros(0, dtype=np.int64)
    segment = int(np.searchsorted(layout.segment_starts, position, side="right")) - 1
    parts = [np.arange(max(segments[segment].start, position - count), position)]
    missing, parent = count - len(parts[0]), segments[segment].parent
    while missing and parent >= 0:
        above = segments[parent]
        stop = above.start + above.length
        parts.append(np.arange(max(above.start, stop - missing), stop))
        missing -= len(parts[-1])
        parent = above.parent
    parts.append(last_root_positions(layout, missing))
    return np.concatenate(parts[::-1])


def num_root_positions(layout: PackedLayout) -> int:
    """Positions of a root that an earlier row has run."""
    return 0 if layout.root_stage is None else int(layout.root_stage.on.cu_k[-1])


def last_root_positions(layout: PackedLayout, count: int) -> np.ndarray:
    """The last `count` of them, or all there are, as `rows_before` counts them."""
    num_root = num_root_positions(layout)
    return layout.num_tokens + np.arange(max(0, num_root - count), num_root)


def _copies(key_rows: np.ndarray, num_rows: int) -> Copies[np.ndarray]:
    counts = np.bincount(key_rows, minlength=num_rows)
    return Copies(order=np.argsort(key_rows, kind="stable"), bounds=np.append(0, np.cumsum(counts)))
