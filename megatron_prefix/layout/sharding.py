"""Which context-parallel rank holds which positions of a packed row.

Only keys and values that queries of several ranks see have to travel. So a subtree (a response, or
a group that fits) stays whole on one rank wherever it can, and what is above it is sharded: each
sharded segment is cut into an early and a late chunk per rank, nested like onion skins, so that a
rank's late chunk, whose queries see many keys, makes up for its early one ("zigzag").

Invariants, with C = tokens of the row / ranks:

- every position of the row, but for padding, is on exactly one rank;
- every rank has C tokens, padding included: whole segments take what they take, shards and padding
  fill up the rest;
- a segment whose ancestor is whole is whole on the same rank, so sharded segments' ancestors are
  sharded;
- the early chunks of a sharded segment, in the ranks' `order`, then its late chunks in the opposite
  order, are the segment;
- the result is a function of the row and the number of ranks alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_prefix.layout.packing import PackedLayout
from megatron_prefix.layout.pairs import attention_pairs_of


@dataclass(frozen=True, kw_only=True, eq=False)
class ContextShards:
    """The place of every segment of a packed row on `num_ranks` context-parallel ranks."""

    layout: PackedLayout
    num_ranks: int
    sharded: np.ndarray
    """[sharded] ascending indices of the segments that are cut into chunks."""
    rank_of_segment: np.ndarray
    """[segments] int64: the rank of a whole segment; -1 for a sharded one."""
    order: np.ndarray
    """[ranks] int64: how many ranks' chunks enclose this rank's, 0 for the first and last chunk."""
    early: np.ndarray
    """[sharded, ranks] int64: tokens of each rank's early chunk, possibly 0."""
    late: np.ndarray
    """[sharded, ranks] int64: tokens of each rank's late chunk, possibly 0."""

    @property
    def tokens_per_rank(self) -> int:
        """C, padding included."""
        return self.layout.num_tokens // self.num_ranks

    @cached_property
    def early_starts(self) -> np.ndarray:
        """[sharded, ranks] int64: where each early chunk begins in its segment."""
        by_place = np.argsort(self.order)
        lengths = self.early[:, by_place]
        return (np.cumsum(lengths, axis=1) - lengths)[:, self.order]

    @cached_property
    def late_starts(self) -> np.ndarray:
        """[sharded, ranks] int64: where each late chunk begins in its segment."""
        by_place = np.argsort(self.order)
        return (self._sharded_lengths[:, None] - np.cumsum(self.late[:, by_place], axis=1))[
            :, self.order
        ]

    @cached_property
    def shard_tokens(self) -> np.ndarray:
        """[ranks] int64: tokens of all chunks of each rank, whose keys and values travel."""
        return (self.early + self.late).sum(axis=0)

    @cached_property
    def attention_pairs(self) -> np.ndarray:
        """[ranks] int64: (query, key) pairs of each rank's queries, without padding."""
        return self.pairs(attention_pairs_of)

    def pairs(self, pairs_of: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """[ranks] int64: the same, counted otherwise.

        Args:
            pairs_of: for arrays of queries, and of keys before the first of them, the pairs; see
                `attention_pairs_of`.
        """
        segments = self.layout.segments
        work = np.zeros(self.num_ranks, dtype=np.int64)
        pairs = pairs_of(
            np.array([s.length for s in segments], dtype=np.int64),
            np.array([s.first_position for s in segments], dtype=np.int64),
        )
        whole = self.rank_of_segment >= 0
        np.add.at(work, self.rank_of_segment[whole], pairs[whole])
        above = np.array([segments[i].first_position for i in self.sharded], dtype=np.int64)
        for lengths, starts in ((self.early, self.early_starts), (self.late, self.late_starts)):
            work += pairs_of(lengths, above[:, None] + starts).sum(axis=0)
        return work

    @property
    def imbalance(self) -> float:
        """The busiest rank's attention work above the mean, as a part of the mean."""
        work = self.attention_pairs
        return float(work.max() / work.mean() - 1) if work.any() else 0.0

    def summary(self) -> str:
        """What the ranks must agree on, in a line: sizes, and a hash of every place."""
        digest = hashlib.sha256()
        for values in (self.sharded, self.rank_of_segment, self.order, self.early, self.late):
            digest.update(values.astype(np.int64).tobytes())
        for segment in self.layout.segments:
            digest.update(f"{segment.parent} {segment.length},".encode())
        return (
            f"{len(self.layout.segments)} segments in {self.layout.num_tokens} tokens, "
            f"{self.tokens_per_rank} per rank, {len(self.sharded)} segments of "
            f"{int(self.shard_tokens.sum())} tokens sharded, {digest.hexdigest()[:16]}"
        )

    @cached_property
    def _sharded_lengths(self) -> np.ndarray:
        segments = self.layout.segments
        return np.array([segments[i].length for i in self.sharded], dtype=np.int64)
