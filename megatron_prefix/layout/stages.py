"""One variable-length attention call, as planned on the host and as it runs on the device.

Both have the same types: their arrays are NumPy's where a row is planned, and tensors on the device
(`record_to_device` makes the one of the other).

Stage 0 of a row is the self stage: every segment attends to itself, causally, over the whole row.
The others are cross stages: segments attend to ancestors, without a mask. Packing in level order
makes the queries and the keys of a stage slices, so that it needs no gather and no copy. A layer
with a sliding window has one stage in place of all of these, see `windows.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

Array = TypeVar("Array")
"""np.ndarray, or torch.Tensor on the device."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rectangles(Generic[Array]):
    """Rectangle i is queries cu_q[i]:cu_q[i + 1] against keys cu_k[i]:cu_k[i + 1].

    It may have no queries (a segment that nobody continues), never no keys.
    """

    cu_q: Array
    """[rectangles + 1] int32"""
    cu_k: Array
    """[rectangles + 1] int32"""
    max_q: int
    """Queries of the longest rectangle."""
    max_k: int
    """Keys of the longest rectangle."""
    causal: bool
    """Every rectangle is square, and query j sees keys 0 to j of its rectangle. Otherwise a query
    sees all keys of its rectangle."""
    window: int | None = None
    """Keys that a query sees at most beside its own; None: any number. Only causal rectangles have
    a window. They have at least as many keys as queries, the last keys are the queries' own, and a
    query sees its own key and up to so many right before it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Copies(Generic[Array]):
    """Rows of which a stage's keys hold copies, none, one or several of each."""

    order: Array
    """[copies] int64: the copies, first those of row 0 in their order, then those of row 1, ..."""
    bounds: Array
    """[rows + 1] int64: order[bounds[i]:bounds[i + 1]] are the copies of row i."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionStage(Generic[Array]):
    """Rectangles of some queries of a row, against some keys of it or of another buffer."""

    on: Rectangles[Array]
    """Counted from the first of `queries` and of `keys`."""
    queries: slice | Array
    """Among the tokens that attend: a slice, or (seldom) [n] int64 rows."""
    keys: slice | Array
    """In the row, or in the buffer that the stage is called with: a slice, or (seldom, in a trimmed
    last layer) [n] int64 rows."""
    copies: Copies[Array] | None = None
    """Of all rows, where `keys` may hold a row several times; None: it never does."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GatheredStages(Generic[Array]):
    """Attention to the shards of all ranks, put in order: `all_gather`."""

    source: Array
    """[keys] int64: where in the concatenation of all ranks' shards each key of the buffer lies."""
    stages: tuple[AttentionStage[Array], ...]
    """Queries in the rank's row, keys in the buffer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HaloRows(Generic[Array]):
    """Which keys and values a rank sends to other ranks for their halos, and receives for its own.

    Received rows come behind those of the rank's own row, in the order of the ranks.
    """

    rows: Array
    """[n] int64: the rank's tokens that it sends, first those for rank 0, then those for rank 1,
    ..."""
    sent: tuple[int, ...]
    """[ranks] how many of them each rank gets."""
    received: tuple[int, ...]
    """[ranks] how many rows come from each rank."""
    copies: Copies[Array]
    """Of the rank's tokens in `rows`."""

    @property
    def num_received(self) -> int:
        """Rows from all ranks."""
        return sum(self.received)


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowedStages(Generic[Array]):
    """The attention of a layer with a sliding window, see `windows.py`."""

    stage: AttentionStage[Array]
    """All queries, against the keys of the row and, behind them, those from elsewhere."""
    halo: HaloRows[Array] | None
    """Of other ranks; None: no rank needs a row of another one."""
    root_rows: int
    """So many of the last keys of a root that an earlier row has run."""


def attention_stage(
    queries: slice | np.ndarray,
    keys: slice | np.ndarray,
    q_lengths: np.ndarray,
    k_lengths: np.ndarray,
    *,
    causal: bool,
) -> AttentionStage[np.ndarray]:
    """A stage of these queries and keys, from its rectangles' lengths."""
    cu_q = np.append(0, np.cumsum(q_lengths)).astype(np.int32)
    cu_k = np.append(0, np.cumsum(k_lengths)).astype(np.int32)
    assert cu_q[-1] == _count(queries) and cu_k[-1] == _count(keys)
    return AttentionStage(
        on=Rectangles(
            cu_q=cu_q,
            cu_k=cu_k,
            max_q=int(q_lengths.max()),
            max_k=int(k_lengths.max()),
            causal=causal,
        ),
        queries=queries,
        keys=keys,
    )


def stage_rows(rows: slice | np.ndarray) -> np.ndarray:
    """[n] int64: the rows that a stage's `queries` or `keys` are."""
    return np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows


def _count(rows: slice | np.ndarray) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class Wave(Generic[Array]):
    """Chunks that are computed together."""

    chunks: slice
    before: Array
    """[n] int64: the chunk before each one, counted from the first of the wave before. In a rank's
    first wave, which of `SharedStates.begins` it begins with, or their number for none; in a row
    that goes on from a root of an earlier row, 0 for all; [0] where no chunk of the first wave has
    a state before it."""
    pieces: int = 0
    """So many of the first chunks lie in pieces, see `SharedStates`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedStates(Generic[Array]):
    """The states that context-parallel ranks need of each other.

    A piece is a rank's early or late chunk of a sharded segment; P pieces of all ranks. In order,
    each piece comes behind the one before it on its path, in waves.
    """

    pieces_of_ranks: tuple[int, ...]
    """[ranks] pieces of each rank, longer ones first."""
    begins_of_ranks: tuple[int, ...]
    """[ranks] states that runs of each rank begin with."""
    source: Array
    """[P] int64: where each piece, in order, is among those of all ranks, rank after rank."""
    waves: tuple[Wave[Array], ...]
    """Of pieces in order."""
    begins: Array
    """[begins] int64: the piece, in order, behind which each of these states lies; rank after
    rank."""
    own_begins: slice
    """Those of this rank."""
    own_pieces: Array
    """[n] int64: the rank's pieces, in order."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RunLevel(Generic[Array]):
    """Runs that are computed together: as many runs come before each of them on its path."""

    bounds: tuple[int, ...]
    """[runs + 1] of each run among the level's tokens, on the host."""
    cu_seqlens: Array
    """[runs + 1] int64: the same."""
    before: Array
    """[runs] int64: the run before each one, in the level above. In the first level, the state
    that it begins with, as in the first `Wave`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Runs(Generic[Array]):
    """A row's paths, cut at the ends of segments only. A run lies in one segment."""

    tokens: Array
    """[n] int64: the real tokens, level after level and run after run."""
    place: Array
    """[T] int64: where each token is among them; n on padding."""
    levels: tuple[RunLevel[Array], ...]
    """None in a row of padding alone."""
    pieces: int
    """So many of the first level's first runs are pieces, see `SharedStates`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recurrence(Generic[Array]):
    """The paths of a row's T tokens. Index T stands for none: a row of zeros behind the tokens."""

    inputs: Array
    """[T, width] int64: the last inputs of each token along its path, its own last. Behind the
    tokens are those of `halo`, or the last ones of a root that an earlier row has run, and then the
    row of zeros."""
    chunks: Array
    """[C, size] int64: the tokens of each chunk, wave after wave, filled up with T."""
    waves: tuple[Wave[Array], ...]
    place: Array
    """[T] int64: where each token is among the C * size places of the chunks; 0 on padding."""
    real: Array
    """[T] bool: not padding."""
    runs: Runs[Array]
    """The same paths, cut at the ends of segments only."""
    halo: HaloRows[Array] | None = None
    """Inputs from other ranks; None: no rank needs any."""
    states: SharedStates[Array] | None = None
    """None: no segment is sharded."""
