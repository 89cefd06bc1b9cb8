"""A packed row as a layer reads it whose state runs along each sequence.

Such a layer has a short causal convolution, which reads a token's last inputs along its path, and a
state, which is handed from the end of a segment to all of its children.

The state is computed in chunks. A segment is cut into chunks of at most `size` tokens; the chunk
before one is its segment's or, at the segment's beginning, the last one of the segment above.
Chunks are in waves: those of a wave have as many chunks before them on their paths, so that all of
them can be computed at once from the states behind the wave before.

    prompt  | 0 | 1 | 2 |            response a  | 3 | 4 |        (numbers of waves)
                                     response b  | 3 |

Under context parallelism a rank has the chunks of its own runs: of its pieces of sharded segments,
and of whole segments. Runs whose state comes from a piece begin in wave 0, whichever rank has the
piece (see `shared_states.py`).

In a series of rows those with responses begin in wave 0 too, with the state behind their root.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_prefix.layout.packing import PackedLayout
from megatron_prefix.layout.sharding import ContextShards
from megatron_prefix.layout.shared_states import PlacedStates, placed_states, segment_of
from megatron_prefix.layout.stages import Recurrence, RunLevel, Runs, Wave
from megatron_prefix.layout.waves import in_waves
from megatron_prefix.layout.windows import (
    RankRows,
    exchanged_halo,
    last_root_positions,
    num_root_positions,
    rows_before,
)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Neighbouring tokens of a rank, in one segment."""

    start: int
    """First token in the rank's row."""
    length: int
    parent: int = -1
    """Run that it goes on from, among those before it; -1: none."""
    begin: int = -1
    """State from elsewhere that it begins with, among those of the rank; -1: none."""
    is_piece: bool = False


CHUNK_TOKENS = 64
"""Of a chunk, at most."""


def recurrence(layout: PackedLayout, *, width: int) -> Recurrence[np.ndarray]:
    """Plan a whole row for recurrent layers.

    Args:
        layout: the whole row. Where its root ran in an earlier row, segments go on from that.
        width: inputs that the convolution reads, the token's own included.
    """
    begin = -1 if layout.root_stage is None else 0
    runs = [
        _Run(start=s.start, length=s.length, parent=s.parent, begin=begin if s.parent < 0 else -1)
        for s in layout.segments
    ]
    tokens = np.arange(layout.num_tokens)
    rows = np.where(tokens < layout.num_tokens - layout.num_padding, tokens, -1)
    return _recurrence(layout, rows, runs, width)


def rank_recurrence(shards: ContextShards, rank: int, *, width: int) -> Recurrence[np.ndarray]:
    """Plan one rank's part of a distributed row.

    Args:
        shards: of the packed row.
        rank: of the context-parallel ranks.
        width: see `recurrence`.
    """
    ranks = RankRows.of_ranks(shards)
    states = placed_states(shards, ranks, rank)
    runs = _runs(shards, ranks[rank], states)
    return _recurrence(shards.layout, ranks[rank].rows, runs, width, ranks, rank, states)


def _runs(shards: ContextShards, own: RankRows, states: PlacedStates | None) -> list[_Run]:
    """A rank's pieces, in the order that other ranks know them in, and its whole segments."""
    layout = shards.layout
    begins = {} if states is None else states.begin_of_position
    positions = () if states is None else states.piece_positions
    pieces: dict[int, _Run | None] = dict.fromkeys(positions)
    whole: list[_Run] = []
    run_of_segment: dict[int, int] = {}
    for start, stop in itertools.pairwise(own.bounds.tolist()):
        position = int(own.rows[start])
        if position < 0:
            continue
        run = _Run(start=start, length=stop - start, begin=begins.get(position, -1))
        if position in pieces:
            pieces[position] = dataclasses.replace(run, is_piece=True)
            continue
        segment = segment_of(layout, position)
        parent = run_of_segment.get(layout.segments[segment].parent, -1)
        run_of_segment[segment] = len(pieces) + len(whole)
        whole.append(dataclasses.replace(run, parent=parent))
    return [*pieces.values(), *whole]


def _recurrence(
    layout: PackedLayout,
    rows: np.ndarray,
    runs: Sequence[_Run],
    width: int,
    ranks: Sequence[RankRows] = (),
    rank: int = 0,
    states: PlacedStates | None = None,
) -> Recurrence[np.ndarray]:
    """Plan a rank's runs.

    Args:
        rows: [T] position in the packed row of each token; -1 on padding.
        ranks, rank, states: under context parallelism.
    """
    num_tokens, num_root = len(rows), num_root_positions(layout)
    real = rows >= 0
    place = np.full(layout.num_tokens + num_root, -1, dtype=np.int64)
    place[rows[real]] = np.flatnonzero(real)
    halo, elsewhere = None, last_root_positions(layout, width - 1)
    if ranks:
        assert num_root == 0, "no series of rows with context parallelism"
        halo, elsewhere = exchanged_halo(layout, ranks, rank, width - 1, place)
    place[elsewhere] = num_tokens + np.arange(len(elsewhere))
    num_begins = min(num_root, 1) if states is None else states.num_begins
    chunks, waves = _waves(runs, num_tokens, num_begins)
    places = np.zeros(num_tokens + 1, dtype=np.int64)
    places[chunks.reshape(-1)] = np.arange(chunks.size)
    return Recurrence(
        inputs=_inputs(layout, rows, runs, width, place, num_tokens + len(elsewhere)),
        chunks=chunks,
        waves=waves,
        place=np.where(real, places[:-1], 0),
        real=real,
        runs=_levels(runs, num_tokens, num_begins),
        halo=halo,
        states=None if states is None else states.shared,
    )


def _waves(
    runs: Sequence[_Run], num_tokens: int, num_begins: int
) -> tuple[np.ndarray, tuple[Wave[np.ndarray], ...]]:
    """[C, size] tokens of the chunks, wave after wave, and the waves.

    A row of padding alone has one chunk, of no token.
    """
    runs = runs or [_Run(start=0, length=0)]
    size = _chunk_size([run.length for run in runs])
    rows, before, of_chunk = [], [], []
    last_of_run: list[int] = []
    for run in runs:
        parent = last_of_run[run.parent] if run.parent >= 0 else -1
        for first in range(0, max(run.length, 1), size):
            tokens = np.full(size, num_tokens, dtype=np.int64)
            count = min(size, run.length - first)
            tokens[:count] = run.start + first + np.arange(count)
            rows.append(tokens)
            before.append(parent)
            of_chunk.append((run.begin % (num_begins + 1), run.is_piece))
            parent = len(rows) - 1
        last_of_run.append(parent)
    found, order = in_waves(before)
    begins, in_piece = np.array(of_chunk, dtype=np.int64)[order].T
    waves = [dataclasses.replace(wave, pieces=int(in_piece[wave.chunks].sum())) for wave in found]
    if num_begins:
        waves[0] = dataclasses.replace(waves[0], before=begins[waves[0].chunks])
    return np.array(rows)[order], tuple(waves)


def widest_wave(lengths: Sequence[int], parents: Sequence[int]) -> int:
    """Chunks that are computed at once, at most, of runs of these lengths.

    Args:
        parents: of each run the one before it that it goes on from; -1: none.
    """
    size = _chunk_size(lengths)
    ends: list[int] = []
    # Of each wave, by how many chunks it has more than the one before it.
    changes: Counter[int] = Counter()
    for length, parent in zip(lengths, parents, strict=True):
        begin = ends[parent] if parent >= 0 else 0
        ends.append(begin + -(-max(length, 1) // size))
        changes[begin] += 1
        changes[ends[-1]] -= 1
    return max(itertools.accumulate(changes[wave] for wave in sorted(changes)), default=0)


def chunked_tokens(lengths: Sequence[int]) -> int:
    """Tokens of the chunks of runs of these lengths, which are filled up."""
    size = _chunk_size(lengths)
    return sum(-(-max(length, 1) // size) * size for length in lengths)


def _chunk_size(lengths: Sequence[int]) -> int:
    return max(1, min(CHUNK_TOKENS, max(lengths, default=0)))


def _levels(runs: Sequence[_Run], num_tokens: int, num_begins: int) -> Runs[np.ndarray]:
    """The runs, level after level."""
    found, order = in_waves([run.parent for run in runs])
    levels = []
    for wave in found:
        of_level = [runs[i] for i in order[wave.chunks].tolist()]
        bounds = np.cumsum([0] + [run.length for run in of_level])
        before = wave.before
        if not levels and num_begins:
            before = np.array([run.begin % (num_begins + 1) for run in of_level], dtype=np.int64)
        levels.append(RunLevel(bounds=tuple(bounds.tolist()), cu_seqlens=bounds, before=before))
    ranges = [np.arange(runs[i].start, runs[i].start + runs[i].length) for i in order.tolist()]
    tokens = np.concatenate([np.zeros(0, dtype=np.int64), *ranges])
    place = np.full(num_tokens, len(tokens), dtype=np.int64)
    place[tokens] = np.arange(len(tokens))
    return Runs(
        tokens=tokens,
        place=place,
        levels=tuple(levels),
        pieces=sum(run.is_piece for run in runs),
    )


def _inputs(
    layout: PackedLayout,
    rows: np.ndarray,
    runs: Sequence[_Run],
    width: int,
    place: np.ndarray,
    none: int,
) -> np.ndarray:
    """[T, width] see `Recurrence.inputs`.

    Args:
        place: of each position of the packed row, among the rank's tokens and those behind them.
        none: the index of the row of zeros.
    """
    inputs = np.full((len(rows), width), none, dtype=np.int64)
    for run in runs:
        above = place[rows_before(layout, int(rows[run.start]), width - 1)]
        above = np.append(np.full(width - 1 - len(above), none), above)
        own = np.arange(run.start, run.start + run.length)
        inputs[own] = np.lib.stride_tricks.sliding_window_view(np.append(above, own), width)
    return inputs
