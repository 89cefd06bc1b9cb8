"""How groups become the pieces that rows are packed from.

A group over the capacity is divided, into the fewest pieces that fit. All groups may be divided
further, the costliest first, where there would be fewer pieces than slots. Pieces of a group each
run its root once more, unless they form a series.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from megatron_prefix.layout.balancing import first_fit_decreasing
from megatron_prefix.layout.splitting import Piece, SplittableGroup


class Division:
    """Groups in pieces, and how a group is divided further."""

    def __init__(
        self, groups: Sequence[SplittableGroup], pieces: list[list[Piece]], capacity: int
    ) -> None:
        self.groups = groups
        self.pieces = pieces
        """Of each group."""
        self.capacity = capacity

    def divide(self, group: SplittableGroup, count: int) -> list[Piece]:
        """A group in more pieces than `pieces` has of it."""
        return group.split_evenly(count, self.capacity)


class Series(Division):
    """The pieces of a group follow one another on a rank, and run once what all of them share.

    A group is divided into several such series where one would be too much for a rank.
    """

    def __init__(
        self,
        groups: Sequence[SplittableGroup],
        pieces: list[list[Piece]],
        capacity: int,
        largest: float,
    ) -> None:
        """Divide.

        Args:
            groups, pieces, capacity: as of `Division`.
            largest: FLOPs of a series on average, at most.
        """
        super().__init__(groups, pieces, capacity)
        self._rows = pieces
        self.pieces = [
            self.divide(group, -int(-group.cost // largest)) if len(rows) > 1 else rows
            for group, rows in zip(groups, pieces, strict=True)
        ]

    def divide(self, group: SplittableGroup, count: int) -> list[Piece]:
        """A group in so many series, or in more pieces than rows have to be."""
        rows = self._rows[group.index]
        if count < len(rows) and group.root_tokens:
            return group.in_series(count, rows, self.capacity)
        return super().divide(group, count) if count > len(rows) else rows


def divide_to_fit(
    groups: Sequence[SplittableGroup],
    capacity: int,
    data_parallel_size: int,
    microbatch_multiple: int,
) -> list[list[Piece]]:
    """The pieces of each group, the fewest that fit."""
    filled: list[list[Piece]] = []
    even: list[list[Piece]] = []
    for group in groups:
        fits = group.tokens <= capacity
        filled.append(group.whole() if fits else group.fill(capacity))
        even.append(filled[-1] if fits else group.split_evenly(len(filled[-1]), capacity))
    # Even pieces are the better balance. Full ones leave a small rest that goes in with another
    # group; they win where that saves a microbatch.
    if filled == even:
        return even
    per_round = data_parallel_size * microbatch_multiple
    needed_even, needed_filled = (
        microbatches_for(divided, capacity, per_round, microbatch_multiple)
        for divided in (even, filled)
    )
    return even if needed_even <= needed_filled else filled


def microbatches_for(
    divided: Sequence[Sequence[Piece]], capacity: int, per_round: int, microbatch_multiple: int
) -> int:
    """Microbatches of a rank that all pieces fit into."""
    num_bins = len(first_fit_decreasing([p for parts in divided for p in parts], capacity))
    return max(1, -(-num_bins // per_round)) * microbatch_multiple


def divide_to_fill(division: Division, num_slots: int) -> list[list[Piece]]:
    """Divide the costliest groups further until there is a piece for every slot."""
    groups, divided = division.groups, division.pieces
    missing = num_slots - sum(len(parts) for parts in divided)
    if missing <= 0:
        return divided
    counts = [len(parts) for parts in divided]
    costliest = [
        (-group.mean_cost_of_pieces(counts[group.index]), group.index)
        for group in groups
        if counts[group.index] < group.num_branches
    ]
    heapq.heapify(costliest)
    while missing and costliest:
        i = heapq.heappop(costliest)[1]
        counts[i] += 1
        missing -= 1
        if counts[i] < groups[i].num_branches:
            heapq.heappush(costliest, (-groups[i].mean_cost_of_pieces(counts[i]), i))
    return [
        parts if count == len(parts) else division.divide(group, count)
        for group, parts, count in zip(groups, divided, counts, strict=True)
    ]
