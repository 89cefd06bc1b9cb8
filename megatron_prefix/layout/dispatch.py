"""The dispatcher: where a packed row's segments go under context parallelism.

A subtree of more tokens than a rank's fair share has its topmost segment sharded, and its children
are subtrees of their own. Whole subtrees go, the costliest first, to the rank with least work that
has room. Ranks with more work than others then get more early and fewer late tokens of the sharded
segments. More is sharded only where some rank's attention work, or what it receives, would still be
above the mean by more than a tolerance: it costs communication.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from megatron_prefix.layout.packing import PackedLayout
from megatron_prefix.layout.pairs import attention_pairs_of
from megatron_prefix.layout.sharding import ContextShards

WORK_TOLERANCE = 0.02
"""A rank's attention work above the mean that is accepted before more is sharded."""

RECEIVED_TOLERANCE = 0.04
"""Likewise a rank's received bytes: one with a small shard receives more than others."""

_FILLERS_TRIED = 8


def shard_layout(layout: PackedLayout, num_ranks: int) -> ContextShards:
    """Distribute a packed row over context-parallel ranks.

    Args:
        layout: packed with a `pad_to_multiple` of at least `num_ranks` (times the tensor-parallel
            size under sequence parallelism).
        num_ranks: the context-parallel size.

    Raises:
        ValueError: the row's length is not a multiple of `num_ranks`.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks={num_ranks} must be at least 1")
    if layout.num_tokens % num_ranks:
        raise ValueError(
            f"a packed row of {layout.num_tokens} tokens does not divide by the {num_ranks} "
            f"context-parallel ranks: pack it with pad_to_multiple={num_ranks} or a multiple of it"
        )
    dispatcher = _Dispatcher(layout, num_ranks)
    return dispatcher.build(dispatcher.best_placement())


def _received_above_mean(shard_tokens: np.ndarray) -> float:
    """What the rank with the smallest shard receives above the mean, as a part of the mean.

    The token that whole numbers may cost is not counted.
    """
    ranks, total = len(shard_tokens), int(shard_tokens.sum())
    if ranks == 1 or total == 0:
        return 0.0
    mean = (ranks - 1) * total / ranks
    return max(0.0, (total - int(shard_tokens.min()) - 1) / mean - 1)


@dataclass(frozen=True, kw_only=True)
class _Placement:
    """Whole subtrees on ranks, and each rank's part of the sharded segments."""

    sharded: np.ndarray
    """[segments] bool"""
    rank_of_root: dict[int, int]
    """Rank of each whole subtree, by its topmost segment."""
    quota: np.ndarray
    """[ranks] int64: tokens of shards and padding that fill the rank up."""
    order: np.ndarray
    """[ranks] int64, see `ContextShards`."""
    early_part: np.ndarray
    """[ranks] float64: part of a rank's shard tokens that are early."""
    work_above_mean: float
    """The busiest rank's attention work above the mean, before chunks are rounded to tokens."""
    received_above_mean: float
    """What the rank with the smallest shard receives, above the mean."""

    @property
    def unevenness(self) -> float:
        """At most 1 is even enough."""
        return max(
            self.work_above_mean / WORK_TOLERANCE, self.received_above_mean / RECEIVED_TOLERANCE
        )

    @property
    def is_even(self) -> bool:
        """Within both tolerances."""
        return self.unevenness <= 1


class _Dispatcher:
    def __init__(self, layout: PackedLayout, num_ranks: int) -> None:
        segments = layout.segments
        self.layout, self.num_ranks = layout, num_ranks
        self.capacity = layout.num_tokens // num_ranks
        self.lengths = np.array([s.length for s in segments], dtype=np.int64)
        self.above = np.array([s.first_position for s in segments], dtype=np.int64)
        self.parents = np.array([s.parent for s in segments], dtype=np.int64)
        # Sums are of whole numbers, hence exact: every machine finds the same places.
        work = attention_pairs_of(self.lengths, self.above)
        self.mean_work = int(work.sum()) / num_ranks
        self.subtree_tokens = _subtree_sums(self.lengths, self.parents)
        self.subtree_work = _subtree_sums(work, self.parents)
        self.largest_first = np.argsort(-self.subtree_tokens, kind="stable")

    def best_placement(self) -> _Placement:
        """Among those tried, the even one that shards least; without an even one, the most even."""
        forced = int((self.subtree_tokens > self.capacity).sum())
        first = self.place(self._largest(forced))
        if first is not None and first.is_even:
            return first
        # One small subtree more as a filler is often all it takes.
        if first is not None:
            for root in self._fillers(first):
                sharded = first.sharded.copy()
                sharded[root] = True
                found = self.place(sharded)
                if found is not None and found.is_even:
                    return found
        return self._shard_more(forced, first)

    def _largest(self, count: int) -> np.ndarray:
        """[segments] bool: the topmost segments of the largest subtrees.

        A parent's subtree is larger than its children's: above a chosen segment all are.
        """
        sharded = np.zeros(len(self.lengths), dtype=bool)
        sharded[self.largest_first[:count]] = True
        return sharded

    def _fillers(self, placement: _Placement) -> list[int]:
        """Some whole subtrees, by the length of their topmost segment, the shortest first."""
        roots = sorted(placement.rank_of_root, key=lambda root: (self.lengths[root], root))
        return roots[:: max(1, len(roots) // _FILLERS_TRIED)]

    def _shard_more(self, too_few: int, best: _Placement | None) -> _Placement:
        """Shard ever more of the largest subtrees, then bisect to nearly the fewest that do.

        Evenness is not quite monotone in their number, so what is most even is kept on the way.
        """
        enough, step = None, 1
        while too_few < len(self.lengths):
            if enough is not None and enough - too_few <= 1 + enough // 16:
                break
            if enough is None:
                tried = min(too_few + step, len(self.lengths))
                step *= 2
            else:
                tried = (too_few + enough) // 2
            found = self.place(self._largest(tried))
            if found is not None and found.is_even:
                enough, best = tried, found
                continue
            too_few = tried
            if enough is None and found is not None:
                best = found if best is None or found.unevenness < best.unevenness else best
        assert best is not None, "without whole subtrees there is always room"
        return best

    def place(self, sharded: np.ndarray) -> _Placement | None:
        """Shard these segments; None if the subtrees below do not fit the ranks whole."""
        below_sharded = np.where(self.parents >= 0, sharded[self.parents], True)
        roots = np.flatnonzero(~sharded & below_sharded)
        roots = roots[np.argsort(-self.subtree_work[roots], kind="stable")]
        rank_of_root = self._place_whole(roots)
        if rank_of_root is None:
            return None
        self._swap(roots, rank_of_root)
        used, work = np.zeros((2, self.num_ranks), dtype=np.int64)
        np.add.at(used, rank_of_root, self.subtree_tokens[roots])
        np.add.at(work, rank_of_root, self.subtree_work[roots])
        quota = self.capacity - used
        order, early_part, shard_work = self._balance(sharded, quota, self.mean_work - work)
        total = work + shard_work
        return _Placement(
            sharded=sharded,
            rank_of_root=dict(zip(roots.tolist(), rank_of_root.tolist(), strict=True)),
            quota=quota,
            order=order,
            early_part=early_part,
            work_above_mean=float(total.max() / self.mean_work - 1) if self.mean_work else 0.0,
            received_above_mean=_received_above_mean(quota),
        )

    def _place_whole(self, roots: np.ndarray) -> np.ndarray | None:
        """[roots] rank of each subtree: in turn, to the rank with least work that has room."""
        ranks = [(0, rank) for rank in range(self.num_ranks)]
        free = [self.capacity] * self.num_ranks
        rank_of_root = np.empty(len(roots), dtype=np.int64)
        sizes = zip(
            self.subtree_tokens[roots].tolist(), self.subtree_work[roots].tolist(), strict=True
        )
        for i, (tokens, cost) in enumerate(sizes):
            full = []
            while ranks and free[ranks[0][1]] < tokens:
                full.append(heapq.heappop(ranks))
            if not ranks:
                return None
            busy, rank = ranks[0]
            heapq.heapreplace(ranks, (busy + cost, rank))
            for item in full:
                heapq.heappush(ranks, item)
            rank_of_root[i] = rank
            free[rank] -= tokens
        return rank_of_root

    def _swap(self, roots: np.ndarray, rank_of_root: np.ndarray) -> None:
        """Exchange subtrees between the fullest and the emptiest rank while that evens them."""
        tokens = self.subtree_tokens[roots]
        used = np.zeros(self.num_ranks, dtype=np.int64)
        np.add.at(used, rank_of_root, tokens)
        for _ in range(2 * self.num_ranks):
            if _received_above_mean(self.capacity - used) <= RECEIVED_TOLERANCE:
                return
            fullest, emptiest = int(used.argmax()), int(used.argmin())
            mine = np.flatnonzero(rank_of_root == fullest)
            theirs = np.flatnonzero(rank_of_root == emptiest)
            if len(theirs) == 0 or len(mine) == 0:
                return
            moved = tokens[mine][:, None] - tokens[theirs][None, :]
            left = np.abs(used[fullest] - used[emptiest] - 2 * moved)
            best = int(left.argmin())
            if left.flat[best] >= used[fullest] - used[emptiest]:
                return
            one, other = mine[best // len(theirs)], theirs[best % len(theirs)]
            rank_of_root[one], rank_of_root[other] = emptiest, fullest
            used[fullest] -= moved.flat[best]
            used[emptiest] += moved.flat[best]

    def _balance(
        self, sharded: np.ndarray, quota: np.ndarray, wanted: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which part of each rank's shards is early, so that it gets the work that is `wanted`.

        In units of a sharded segment's length, a rank with t = early + late of what is left between
        `low` and `high` sees early (low + early / 2) + late (high - late / 2) keys. Outermost
        chunks differ most from the mean, so ranks that want to differ most come first.

        Returns:
            order, early part, and the work that comes of it, each [ranks].
        """
        lengths = self.lengths[sharded]
        share = quota / max(1, quota.sum())
        across = int((lengths * self.above[sharded]).sum())  # pairs with ancestors' keys
        within = int((lengths**2).sum())
        target = (wanted - across * share) / max(1, within)
        per_token = target / np.maximum(share, 1e-12)
        places = np.lexsort((-np.abs(per_token - 0.5), share == 0))
        order = np.empty(self.num_ranks, dtype=np.int64)
        order[places] = np.arange(self.num_ranks)
        early_part, seen = np.full(self.num_ranks, 0.5), np.zeros(self.num_ranks)
        low, high = 0.0, 1.0
        for rank in places.tolist():
            t = float(share[rank])
            between = high - low - t
            early = t / 2
            if between > 1e-12 and t > 0:
                early = min(max((high * t - t * t / 2 - target[rank]) / between, 0.0), t)
            late = t - early
            early_part[rank] = early / t if t > 0 else 0.5
            seen[rank] = early * (low + early / 2) + late * (high - late / 2)
            low, high = low + early, high - late
        return order, early_part, across * share + within * seen

    def build(self, placement: _Placement) -> ContextShards:
        """Round a placement to whole tokens."""
        sharded = np.flatnonzero(placement.sharded)
        rank_of_segment = np.full(len(self.lengths), -1, dtype=np.int64)
        for index in np.flatnonzero(~placement.sharded).tolist():
            root = placement.rank_of_root.get(index)
            rank_of_segment[index] = rank_of_segment[self.parents[index]] if root is None else root
        padding = self.layout.num_padding
        rows = np.append(self.lengths[sharded], padding)
        tokens = _apportion(rows, placement.quota)[:-1]
        # Rounded along the segments, so that the errors do not add up.
        wanted = np.cumsum(tokens * placement.early_part, axis=0)
        early = np.diff(np.floor(wanted + 0.5).astype(np.int64), axis=0, prepend=0)
        return ContextShards(
            layout=self.layout,
            num_ranks=self.num_ranks,
            sharded=sharded,
            rank_of_segment=rank_of_segment,
            order=placement.order,
            early=early,
            late=tokens - early,
        )


def _subtree_sums(values: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """[segments] the sum over each segment and all below it; parents come before children."""
    sums = values.tolist()
    for index, parent in zip(range(len(sums) - 1, -1, -1), parents[::-1].tolist(), strict=True):
        if parent >= 0:
            sums[parent] += sums[index]
    return np.array(sums, dtype=np.int64)


def _apportion(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """[rows, columns] whole numbers near rows x columns / total with exactly these sums."""
    total = int(rows.sum())
    assert total == int(columns.sum())
    if total == 0:
        return np.zeros((len(rows), len(columns)), dtype=np.int64)
    table = rows[:, None] * columns[None, :] // total
    row_rest, column_rest = rows - table.sum(axis=1), columns - table.sum(axis=0)
    # What is left over, unit by unit: rows in turn, from columns that take turns.
    unit_rows = np.repeat(np.arange(len(rows)), row_rest)
    turn = np.concatenate([np.arange(n) for n in column_rest.tolist()] or [np.zeros(0)])
    unit_columns = np.repeat(np.arange(len(columns)), column_rest)
    unit_columns = unit_columns[np.lexsort((unit_columns, turn))]
    np.add.at(table, (unit_rows, unit_columns), 1)
    return table
