"""Which states of recurrent layers context-parallel ranks need of each other.

A sharded segment is cut into pieces, an early and a late one for each rank. What a piece makes of
the state before it is an affine map, which its rank finds without that state. The maps of all
pieces are gathered, and every rank composes them along the paths: so it has the states that its own
pieces begin with, and those behind the sharded segments that its whole segments go on from.

    rank 0   | early 0 |                                 | late 0 |  response a
    rank 1              | early 1 |            | late 1 |             response b
             pieces of a prompt, in the order of its path

Invariants: pieces of sharded segments are all there is before a piece or a rank's whole subtree;
every rank plans the same pieces in the same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_prefix.layout.packing import PackedLayout
from megatron_prefix.layout.sharding import ContextShards
from megatron_prefix.layout.stages import SharedStates
from megatron_prefix.layout.waves import in_waves
from megatron_prefix.layout.windows import RankRows


@dataclass(frozen=True, kw_only=True)
class PlacedStates:
    """The shared states, and where they belong in a rank's row."""

    shared: SharedStates[np.ndarray]
    piece_positions: tuple[int, ...]
    """Position in the packed row that each of the rank's pieces begins at, in their order."""
    begin_of_position: dict[int, int]
    """Which of the rank's `begins` a run begins with, by its first position; none: no entry."""

    @property
    def num_begins(self) -> int:
        """States from pieces that the rank's runs begin with."""
        begins = self.shared.own_begins
        return begins.stop - begins.start


def placed_states(
    shards: ContextShards, ranks: Sequence[RankRows], rank: int
) -> PlacedStates | None:
    """Plan the states of all ranks.

    Args:
        shards: of the packed row.
        ranks: what every rank holds.
        rank: whose own part is told.

    Returns:
        None where no segment is sharded.
    """
    if not len(shards.sharded):
        return None
    segments = shards.layout.segments
    pieces = _pieces(shards, ranks)
    positions = [piece.position for piece in pieces]
    before = _pieces_before(shards.layout, positions)
    waves, order = in_waves(before)
    number = np.argsort(order)
    last_piece = {segment_of(shards.layout, p): i for i, p in enumerate(positions)}
    of_ranks, begins_of_ranks = [], []
    for owner in range(len(ranks)):
        own = [i for i, piece in enumerate(pieces) if piece.rank == owner]
        own.sort(key=lambda i: -pieces[i].length)
        goes_on = {positions[i]: before[i] for i in own if before[i] >= 0}
        for index in np.flatnonzero(shards.rank_of_segment == owner).tolist():
            if segments[index].parent in last_piece:
                goes_on[segments[index].start] = last_piece[segments[index].parent]
        of_ranks.append(own)
        begins_of_ranks.append(goes_on)
    distinct = [np.unique(number[list(found.values())]) for found in begins_of_ranks]
    bounds = np.append(0, np.cumsum([len(found) for found in distinct])).tolist()
    places = {i: place for place, i in enumerate(itertools.chain(*of_ranks))}
    return PlacedStates(
        shared=SharedStates(
            pieces_of_ranks=tuple(map(len, of_ranks)),
            begins_of_ranks=tuple(map(len, distinct)),
            source=np.array([places[i] for i in order.tolist()]),
            waves=waves,
            begins=np.concatenate(distinct),
            own_begins=slice(bounds[rank], bounds[rank + 1]),
            own_pieces=number[of_ranks[rank]],
        ),
        piece_positions=tuple(positions[i] for i in of_ranks[rank]),
        begin_of_position={
            position: int(np.searchsorted(distinct[rank], number[piece]))
            for position, piece in begins_of_ranks[rank].items()
        },
    )


def segment_of(layout: PackedLayout, position: int) -> int:
    """The segment that a position of the packed row lies in."""
    return int(np.searchsorted(layout.segment_starts, position, side="right")) - 1


@dataclass(frozen=True, kw_only=True)
class _Piece:
    position: int
    """In the packed row, of its first token."""
    length: int
    rank: int


def _pieces(shards: ContextShards, ranks: Sequence[RankRows]) -> list[_Piece]:
    """Of all ranks, in the order of the packed row: each behind those before it on its path."""
    pieces = []
    for rank, held in enumerate(ranks):
        for start, stop in itertools.pairwise(held.bounds.tolist()):
            position = int(held.rows[start])
            if position >= 0 and shards.rank_of_segment[segment_of(shards.layout, position)] < 0:
                pieces.append(_Piece(position=position, length=stop - start, rank=rank))
    return sorted(pieces, key=lambda piece: piece.position)


def _pieces_before(layout: PackedLayout, positions: Sequence[int]) -> list[int]:
    """[P] the piece before each on its path; -1: none."""
    before: list[int] = []
    last_piece: dict[int, int] = {-1: -1}
    for index, position in enumerate(positions):
        segment = segment_of(layout, position)
        before.append(last_piece.get(segment, last_piece[layout.segments[segment].parent]))
        last_piece[segment] = index
    return before
