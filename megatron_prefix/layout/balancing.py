"""Which pieces share a microbatch, and which microbatches share a rank.

Pieces are placed costliest first, each into the cheapest microbatch with room. The microbatches
are then dealt in rows of similar cost, one to each rank, the costliest of a row to the rank with
least work so far. Last, the busiest rank exchanges pieces with other ranks for as long as that
makes it less busy. Invariants of what `balanced_ranks` returns:

- every piece is in one microbatch, and no microbatch is over the capacity;
- a microbatch holds at most one piece of a group, and pieces are in the order of their groups;
- no microbatch of a row costs less than any of the next row, and all ranks have one of each row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_prefix.layout.splitting import Piece, SplittableGroup

Microbatch = list[Piece]

WORK_TOLERANCE = 0.003
"""The busiest rank's work above the mean that no more exchanges are made for."""

EXCHANGES_PER_RANK = 2
"""At most, on average."""

RANKS_TRIED = 64
"""Ranks with little work that the busiest rank looks for an exchange with first."""

_MINE_TRIED, _OTHERS_TRIED = 32, 8192
"""Pieces that are compared at most, so that time and memory are bounded for any batch."""


def balanced_ranks(
    pieces: Sequence[Piece],
    groups: Sequence[SplittableGroup],
    *,
    num_ranks: int,
    num_microbatches: int,
    capacity: int,
) -> list[list[Microbatch]]:
    """[rank][microbatch]: pieces of nearly equal cost for each, costly microbatches first.

    Args:
        pieces: that fit into so many microbatches.
        groups: all of them, to join the pieces of one that meet in a microbatch.
        num_ranks: data-parallel ranks.
        num_microbatches: of each rank.
        capacity: tokens of a microbatch at most.
    """
    bins = [
        _one_piece_per_group(members, groups)
        for members in _balanced_bins(pieces, num_ranks * num_microbatches, capacity)
    ]
    return _Exchange(_deal_to_ranks(bins, num_ranks), capacity).run()


def first_fit_decreasing(pieces: Sequence[Piece], capacity: int) -> list[Microbatch]:
    """Few bins, by tokens: at most 11/9 of the fewest possible, plus one."""
    bins: list[Microbatch] = []
    free = np.full(len(pieces), capacity, dtype=np.int64)
    for piece in sorted(pieces, key=lambda piece: -piece.tokens):
        # All bins that are not open yet have room, so the first with room always exists.
        first = int((free >= piece.tokens).argmax())
        if first == len(bins):
            bins.append([])
        bins[first].append(piece)
        free[first] -= piece.tokens
    return bins


def _balanced_bins(pieces: Sequence[Piece], num_bins: int, capacity: int) -> list[Microbatch]:
    """Bins of nearly equal cost within the capacity; none is empty if there are enough pieces."""
    for key in (lambda piece: -piece.cost, lambda piece: -piece.tokens):
        bins = _cheapest_bin_first(sorted(pieces, key=key), num_bins, capacity)
        if bins is not None:
            return bins
    # Too tight for balance: keep the bins that fit, and use those that are left over.
    bins = first_fit_decreasing(pieces, capacity)
    while len(bins) < num_bins and any(len(members) > 1 for members in bins):
        costliest = max((m for m in bins if len(m) > 1), key=_cost)
        bins.append([costliest.pop(0)])
    return bins + [[] for _ in range(num_bins - len(bins))]


def _cheapest_bin_first(
    pieces: Sequence[Piece], num_bins: int, capacity: int
) -> list[Microbatch] | None:
    """Each piece in turn to the cheapest bin with room; None if one finds no room."""
    bins: list[Microbatch] = [[] for _ in range(num_bins)]
    free = np.full(num_bins, capacity, dtype=np.int64)
    costs = np.zeros(num_bins, dtype=np.float64)
    for piece in pieces:
        cheapest = int(np.where(free >= piece.tokens, costs, np.inf).argmin())
        if free[cheapest] < piece.tokens:
            return None
        bins[cheapest].append(piece)
        free[cheapest] -= piece.tokens
        costs[cheapest] += piece.cost
    return bins


def _one_piece_per_group(pieces: Sequence[Piece], groups: Sequence[SplittableGroup]) -> Microbatch:
    """In the order of the groups; pieces of one group that have met again are joined."""
    by_group: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_group.setdefault(piece.group, []).append(piece)
    return [
        parts[0] if len(parts) == 1 else groups[group].join(parts)
        for group, parts in sorted(by_group.items())
    ]


def _deal_to_ranks(bins: Sequence[Microbatch], num_ranks: int) -> list[list[Microbatch]]:
    """Rows of similar cost, costliest row first; in a row, the costliest to the least busy rank."""
    ordered = sorted(bins, key=lambda members: -_cost(members))
    ranks: list[list[Microbatch]] = [[] for _ in range(num_ranks)]
    work = [0] * num_ranks
    for row in range(0, len(ordered), num_ranks):
        least_busy_first = sorted(range(num_ranks), key=work.__getitem__)
        for rank, members in zip(least_busy_first, ordered[row : row + num_ranks], strict=True):
            ranks[rank].append(members)
            work[rank] += _cost(members)
    return ranks


def _cost(pieces: Sequence[Piece]) -> int:
    return sum(piece.cost for piece in pieces)


class _Exchange:
    """The exchange of pieces between ranks, over arrays.

    Legend: P pieces, R ranks, M microbatches of a rank (rows).
    """

    def __init__(self, ranks: Sequence[Sequence[Microbatch]], capacity: int) -> None:
        placed = [
            (piece, rank, row)
            for rank, microbatches in enumerate(ranks)
            for row, members in enumerate(microbatches)
            for piece in members
        ]
        self.capacity = capacity
        self.pieces = [piece for piece, _, _ in placed]
        self.shape = (len(ranks), len(ranks[0]))
        self.rank = np.array([rank for _, rank, _ in placed], dtype=np.int64)  # [P]
        self.row = np.array([row for _, _, row in placed], dtype=np.int64)  # [P]
        self.group = np.array([piece.group for piece in self.pieces], dtype=np.int64)  # [P]
        self.tokens = np.array([piece.tokens for piece in self.pieces], dtype=np.int64)  # [P]
        # Whole numbers, hence exact; in units of FLOPs unless their sum needs more than 62 bits.
        unit = 2 ** max(0, _cost(self.pieces).bit_length() - 62)
        self.cost = np.array([piece.cost // unit for piece in self.pieces], dtype=np.int64)  # [P]
        self.row_tokens = np.zeros(self.shape, dtype=np.int64)  # [R, M]
        self.row_cost = np.zeros(self.shape, dtype=np.int64)  # [R, M]
        np.add.at(self.row_tokens, (self.rank, self.row), self.tokens)
        np.add.at(self.row_cost, (self.rank, self.row), self.cost)

    def run(self) -> list[list[Microbatch]]:
        """Exchange for as long as the busiest rank gets less work; then the microbatches."""
        num_ranks, num_rows = self.shape
        enough = int(self.cost.sum()) / num_ranks * (1 + WORK_TOLERANCE)
        for _ in range(EXCHANGES_PER_RANK * num_ranks):
            work = self.row_cost.sum(axis=1)
            if work.max() <= enough:
                break
            found = self._best_exchange(work)
            if found is None:
                break
            self._exchange(*found)
        ranks: list[list[Microbatch]] = [[[] for _ in range(num_rows)] for _ in range(num_ranks)]
        for i in np.argsort(self.group, kind="stable").tolist():
            ranks[self.rank[i]][self.row[i]].append(self.pieces[i])
        return ranks

    def _best_exchange(self, work: np.ndarray) -> tuple[int, int] | None:
        """A piece of the busiest rank and one of another rank; None if no exchange helps.

        Tried are the ranks with least work, and all ranks only if none of those helps.
        """
        mine = _spread(np.flatnonzero(self.rank == work.argmax()), _MINE_TRIED)
        idle = np.zeros(len(work), dtype=bool)
        idle[np.argsort(work, kind="stable")[:RANKS_TRIED]] = True
        found = self._best_exchange_with(np.flatnonzero(idle[self.rank]), mine, work)
        return found or self._best_exchange_with(np.arange(len(self.pieces)), mine, work)

    def _best_exchange_with(
        self, others: np.ndarray, mine: np.ndarray, work: np.ndarray
    ) -> tuple[int, int] | None:
        others = _spread(others, _OTHERS_TRIED)
        moved = self.cost[mine][:, None] - self.cost[others]
        after = np.maximum(work.max() - moved, work[self.rank[others]] + moved)
        helps = np.flatnonzero((after < work.max()) & self._allowed(mine, others, moved))
        for best in helps[np.argsort(after.flat[helps], kind="stable")].tolist():
            one, other = int(mine[best // len(others)]), int(others[best % len(others)])
            if not (self._meets_its_group(one, other) or self._meets_its_group(other, one)):
                return one, other
        return None

    def _allowed(self, mine: np.ndarray, others: np.ndarray, moved: np.ndarray) -> np.ndarray:
        """[mine, others] bool: the exchange keeps to the capacity, and rows in their order.

        Args:
            mine: pieces of the busiest rank.
            others: pieces.
            moved: [mine, others] work that the busiest rank gets rid of.
        """
        longer = self.tokens[mine][:, None] - self.tokens[others]
        mine_tokens = self.row_tokens[self.rank[mine], self.row[mine]][:, None] - longer
        other_tokens = self.row_tokens[self.rank[others], self.row[others]] + longer
        mine_cost = self.row_cost[self.rank[mine], self.row[mine]][:, None] - moved
        other_cost = self.row_cost[self.rank[others], self.row[others]] + moved
        # A row's costs lie between the largest of the next row and the smallest of the one before.
        least = np.append(self.row_cost[:, 1:].max(axis=0), 0)[self.row[mine]][:, None]
        most = np.append(np.iinfo(np.int64).max, self.row_cost[:, :-1].min(axis=0))
        in_next_row = self.row[others] == self.row[mine][:, None] + 1
        return (
            (moved > 0)
            & (np.maximum(mine_tokens, other_tokens) <= self.capacity)
            & (mine_cost >= least)
            & (other_cost <= most[self.row[others]])
            & (~in_next_row | (mine_cost >= other_cost))
        )

    def _meets_its_group(self, piece: int, replaced: int) -> bool:
        """Whether another piece of the group is in the microbatch where `piece` would go."""
        there = (self.rank == self.rank[replaced]) & (self.row == self.row[replaced])
        there[replaced] = False
        return bool((self.group[there] == self.group[piece]).any())

    def _exchange(self, one: int, other: int) -> None:
        for values, totals in ((self.tokens, self.row_tokens), (self.cost, self.row_cost)):
            moved = values[one] - values[other]
            totals[self.rank[one], self.row[one]] -= moved
            totals[self.rank[other], self.row[other]] += moved
        for place in (self.rank, self.row):
            place[one], place[other] = place[other], place[one]


def _spread(indices: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the indices, from all along."""
    return indices[:: max(1, -(-len(indices) // most))]
