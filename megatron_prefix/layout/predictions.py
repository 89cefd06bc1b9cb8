"""The rows of multi-token prediction: at each depth a row of another shift.

Depth k of D attends to the row of shift k (`pack`), where each position reads the token k behind
it, its label there. Its output is needed, by its loss and by the next depth, at the positions of
shift k + 1, whose label is what it predicts. In between rows move: a position that several nodes
have, since their first tokens lie behind it, is copied to each of them.

Invariants of the moves from shift k to shift k + 1:

- a position of shift k + 1 takes the same position of the same path, that of its own node or the
  last one of its node's parent;
- every position of shift k that another token follows, k + 1 behind, is taken at least once;
- padding takes what is there, and nothing reads it.

All rows of a tree are padded to the length of the first one.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np

from megatron_prefix.layout.packing import PackedLayout, pack
from megatron_prefix.layout.rank_row import rank_row
from megatron_prefix.layout.rows import COMM_TYPES, CommType, ModelRow, RankRow, own_values
from megatron_prefix.layout.stages import Array
from megatron_prefix.layout.windows import RankRows


@dataclass(frozen=True, kw_only=True, eq=False)
class RowMoves(Generic[Array]):
    """How the rows of one shift become those of the next, on one context-parallel rank."""

    take: Array
    """[C] int64: which of the rank's rows, or of those that it receives, each new row is."""
    send: Array | None = None
    """[rows sent] int64: which of its rows the rank sends, by receiving rank; None: there is one
    rank."""
    sent: tuple[int, ...] = ()
    """[ranks] rows for each of them."""
    received: tuple[int, ...] = ()
    """[ranks] rows from each of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DepthArrays(Generic[Array]):
    """What a depth of prediction reads: all that goes to the device."""

    model: ModelRow[Array]
    """Of shift k."""
    tokens: Array
    """[C] int64: the tokens k behind, which it reads; 0 on padding."""
    moves: RowMoves[Array]
    predictions: Array
    """[C] int64, of shift k: tokens of all sequences that are predicted from each row; 0 on
    padding."""
    labels: Array
    """[C] int64, of shift k + 1: what it predicts; 0 on padding."""
    multiplicity: Array
    """[C] int64, of shift k + 1: sequences that run through each label; 0 on padding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DepthPlan:
    """One depth of prediction on one context-parallel rank."""

    row: RankRow
    """Of shift k: it reads the row's labels, and attends."""
    moves: RowMoves[np.ndarray]
    predictions: np.ndarray
    """See `DepthArrays`."""
    num_predictions: int
    """Of all rows, on all ranks."""
    following: RankRow
    """Of shift k + 1: what it predicts are the row's labels."""

    @property
    def arrays(self) -> DepthArrays[np.ndarray]:
        """All that goes to the device."""
        return DepthArrays(
            model=self.row.model,
            tokens=self.row.labels,
            moves=self.moves,
            predictions=self.predictions,
            labels=self.following.labels,
            multiplicity=self.following.model.multiplicity,
        )


def shifted_layouts(layout: PackedLayout, depths: int) -> list[PackedLayout]:
    """The layouts of shift 1, which is given, to depths + 1."""
    return [
        layout,
        *(
            pack(layout.tree, pad_to=layout.num_tokens, shift=shift)
            for shift in range(2, depths + 2)
        ),
    ]


def plan_depths(
    layouts: Sequence[PackedLayout],
    *,
    rank: int = 0,
    num_ranks: int = 1,
    comm_types: Collection[CommType] = COMM_TYPES,
    window: int | None = None,
) -> tuple[DepthPlan, ...]:
    """Plan this rank's part of each depth of prediction.

    Args:
        layouts: of `shifted_layouts`.
        rank, num_ranks, comm_types, window: as for `rank_row`.
    """
    rows = [
        rank_row(layout, rank=rank, num_ranks=num_ranks, comm_types=comm_types, window=window)
        for layout in layouts
    ]
    found = []
    for (before, after), (layout, following) in zip(
        itertools.pairwise(rows), itertools.pairwise(layouts), strict=True
    ):
        source = copied_rows(layout, following)
        predictions = np.zeros(layout.num_tokens, dtype=np.int64)
        np.add.at(predictions, source, following.multiplicity)
        found.append(
            DepthPlan(
                row=before,
                moves=_moves(source, before, after, rank),
                predictions=own_values(predictions, before.rows),
                num_predictions=int(predictions.sum()),
                following=after,
            )
        )
    return tuple(found)


def copied_rows(layout: PackedLayout, following: PackedLayout) -> np.ndarray:
    """[T of the following] int64: which row of a layout each one of the next shift's is.

    Args:
        layout: of a tree.
        following: of the same tree, its shift larger by 1. Its padding takes row 0.
    """
    assert following.shift == layout.shift + 1
    source = np.zeros(following.num_tokens, dtype=np.int64)
    of_node = {segment.node: segment for segment in layout.segments}
    for segment in following.segments:
        before = of_node[segment.node]
        rows = np.arange(segment.length) + before.start
        if segment.first_position < before.first_position:
            rows -= 1
            parent = layout.segments[before.parent]
            rows[0] = parent.start + parent.length - 1
        source[segment.start : segment.start + segment.length] = rows
    return source


def _moves(source: np.ndarray, row: RankRow, following: RankRow, rank: int) -> RowMoves[np.ndarray]:
    """The moves of a rank.

    Args:
        source: of the whole rows, from `copied_rows`.
        row, following: of the rank.
        rank: among those that the rows are distributed over.
    """
    if row.shards is None or following.shards is None:
        return RowMoves(take=source)
    before, after = (RankRows.of_ranks(shards) for shards in (row.shards, following.shards))
    owner, place = np.zeros((2, len(source)), dtype=np.int64)
    for index, of_rank in enumerate(before):
        real = of_rank.rows >= 0
        owner[of_rank.rows[real]] = index
        place[of_rank.rows[real]] = np.flatnonzero(real)

    def wanted(of_rank: int) -> tuple[np.ndarray, np.ndarray]:
        """[C] of each row of a rank: who has it, and where."""
        rows = after[of_rank].rows
        real = rows >= 0
        return (
            np.where(real, owner[source[rows]], of_rank),
            np.where(real, place[source[rows]], 0),
        )

    owners, _ = wanted(rank)
    order = np.argsort(owners, kind="stable")
    take = np.empty_like(order)
    take[order] = np.arange(len(order))
    send = []
    for receiver in range(len(after)):
        their_owners, their_places = wanted(receiver)
        send.append(their_places[their_owners == rank])
    return RowMoves(
        take=take,
        send=np.concatenate(send),
        sent=tuple(len(rows) for rows in send),
        received=tuple(np.bincount(owners, minlength=len(after)).tolist()),
    )
