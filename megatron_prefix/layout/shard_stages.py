"""The row of one context-parallel rank, and the stages of its attention.

A rank's row begins with its shards, so that what travels is one slice:

    level 0: early chunks, late chunks | level 1: early, late | ...    of sharded segments
    level 0: whole segments | level 1: whole segments | ...
    padding

Runs of one (level, kind) are a block, in the order of their segments. As in a packed row, the
descendants of consecutive segments of a block are consecutive in every other block, so a block of
queries against a block of keys is one stage of slices (but for queries whose ancestor on that level
lies elsewhere, which are left out).

A query sees, besides what is whole on its rank:

- all chunks of its ancestors;
- in an early chunk, the early chunks of its own segment that lie further out in the ranks' order;
- in a late chunk, all early chunks of its own segment, and the late ones further in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from megatron_prefix.layout.rows import CommType, RowStages, WholeRow
from megatron_prefix.layout.sharding import ContextShards
from megatron_prefix.layout.stages import AttentionStage, GatheredStages, attention_stage

Stages = tuple[AttentionStage[np.ndarray], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Block:
    """Runs of one level, adjacent in a buffer of queries or keys."""

    level: int
    kind: str
    offset: int
    """Where the block begins in the buffer."""
    segments: np.ndarray
    """[runs] ascending; a segment has at most one run here."""
    starts: np.ndarray
    """[runs] first position of each run in the packed row."""
    lengths: np.ndarray
    """[runs] at least one position each."""

    @property
    def end(self) -> int:
        return self.offset + int(self.lengths.sum())


def stages_of_rank(
    shards: ContextShards, rank: int, comm_types: Collection[CommType]
) -> tuple[np.ndarray, RowStages[np.ndarray]]:
    """One rank's rows (see `RankRow`), and the stages of all of its tokens.

    Args:
        shards: of the packed row.
        rank: of the context-parallel ranks.
        comm_types: the kinds of communication that stages are made for.
    """
    of_rank = RankStages(shards, rank)
    ring = None
    if "p2p" in comm_types:
        ring = tuple(of_rank.from_shard(peer) for peer in range(shards.num_ranks))
    gathers = not {"all_gather", "latent_gather"}.isdisjoint(comm_types)
    stages = RowStages(
        num_tokens=shards.tokens_per_rank,
        queries=None,
        cu_seqlens_q=np.array([0, shards.tokens_per_rank], dtype=np.int32),
        local=of_rank.local(),
        gathered=of_rank.from_all_shards() if gathers else None,
        ring=ring,
        whole_row=_whole_row(shards) if "a2a" in comm_types else None,
    )
    return of_rank.rows(), stages


def _whole_row(shards: ContextShards) -> WholeRow[np.ndarray]:
    layout = shards.layout
    ranks = range(shards.num_ranks)
    to_ranks = np.concatenate([RankStages(shards, rank).rows() for rank in ranks])
    to_ranks[to_ranks < 0] = np.arange(layout.num_tokens - layout.num_padding, layout.num_tokens)
    return WholeRow(stages=layout.stages, from_ranks=np.argsort(to_ranks), to_ranks=to_ranks)


class RankStages:
    """One rank's row and stages."""

    def __init__(self, shards: ContextShards, rank: int) -> None:
        self._shards, self._rank = shards, rank
        segments = shards.layout.segments
        self._levels = np.array([s.level for s in segments], dtype=np.int64)
        self._parents = np.array([s.parent for s in segments], dtype=np.int64)
        self._starts = np.array([s.start for s in segments], dtype=np.int64)
        self._lengths = np.array([s.length for s in segments], dtype=np.int64)
        self._own_shard = self._shard_blocks(rank)
        self._whole = self._whole_blocks(self._own_shard[-1].end if self._own_shard else 0)

    def rows(self) -> np.ndarray:
        """[tokens_per_rank] int64: each token's position in the packed row; -1 for padding."""
        rows = np.full(self._shards.tokens_per_rank, -1, dtype=np.int64)
        for block in (*self._own_shard, *self._whole):
            rows[block.offset : block.end] = _positions(block)
        return rows

    def local(self) -> Stages:
        """What needs no communication: the self stage first, then subtrees that are whole here."""
        num_tokens = self._shards.tokens_per_rank
        blocks = (*self._own_shard, *self._whole)
        end = blocks[-1].end if blocks else 0
        lengths = np.concatenate([b.lengths for b in blocks] or [np.zeros(0, dtype=np.int64)])
        if end < num_tokens:
            lengths = np.append(lengths, num_tokens - end)
        row = slice(0, num_tokens)
        self_stage = attention_stage(row, row, lengths, lengths, causal=True)
        pairs = ((q, k) for q in self._whole for k in self._whole if k.level < q.level)
        return (self_stage, *self._cross_stages(pairs))

    def from_shard(self, rank: int) -> Stages:
        """Attention to one rank's shard, keys counted from its beginning: a step of `p2p`."""
        order = self._shards.order
        outer, inner = order[rank] < order[self._rank], order[rank] > order[self._rank]

        def sees(q: _Block, k: _Block) -> bool:
            if k.level != q.level:
                return k.level < q.level
            if k.kind == "early":
                return q.kind == "late" or (q.kind == "early" and outer)
            return q.kind == "late" and inner

        return self._cross_stages(
            (q, k)
            for q in (*self._own_shard, *self._whole)
            for k in self._shard_blocks(rank)
            if sees(q, k)
        )

    def from_all_shards(self) -> GatheredStages[np.ndarray]:
        """Attention to all shards at once.

        The buffer holds, level by level, the keys before the rank's early chunk of every segment,
        those from there to its late chunk, and those from there to the end (for descendants only).
        """
        blocks = self._ordered_blocks()

        def sees(q: _Block, k: _Block) -> bool:
            if k.level != q.level:
                return k.level < q.level
            return (q.kind, k.kind) in {
                ("early", "before early"),
                ("late", "before early"),
                ("late", "before late"),
            }

        queries = (*self._own_shard, *self._whole)
        stages = self._cross_stages((q, k) for q in queries for k in blocks if sees(q, k))
        place = np.full(self._shards.layout.num_tokens, -1, dtype=np.int64)
        base = 0
        for rank in range(self._shards.num_ranks):
            for block in self._shard_blocks(rank):
                place[_positions(block)] = base + np.arange(block.offset, block.end)
            base += int(self._shards.shard_tokens[rank])
        source = np.concatenate([place[_positions(b)] for b in blocks] or [place[:0]])
        assert (source >= 0).all()
        return GatheredStages(source=source, stages=stages)

    def _shard_blocks(self, rank: int) -> list[_Block]:
        shards = self._shards
        blocks: list[_Block] = []
        for level in np.unique(self._levels[shards.sharded]).tolist():
            on_level = self._levels[shards.sharded] == level
            for kind, lengths, starts in (
                ("early", shards.early, shards.early_starts),
                ("late", shards.late, shards.late_starts),
            ):
                rows = np.flatnonzero(on_level & (lengths[:, rank] > 0))
                _append(
                    blocks,
                    level=level,
                    kind=kind,
                    segments=shards.sharded[rows],
                    starts=self._starts[shards.sharded[rows]] + starts[rows, rank],
                    lengths=lengths[rows, rank],
                )
        return blocks

    def _whole_blocks(self, offset: int) -> list[_Block]:
        blocks: list[_Block] = []
        here = self._shards.rank_of_segment == self._rank
        for level in np.unique(self._levels[here]).tolist():
            segments = np.flatnonzero(here & (self._levels == level))
            _append(
                blocks,
                level=level,
                kind="whole",
                segments=segments,
                starts=self._starts[segments],
                lengths=self._lengths[segments],
                offset=offset,
            )
        return blocks

    def _ordered_blocks(self) -> list[_Block]:
        """Every sharded segment in three parts, as this rank's queries see them."""
        shards = self._shards
        early = shards.early_starts[:, self._rank]
        late = shards.late_starts[:, self._rank]
        lengths = self._lengths[shards.sharded]
        has_children = np.isin(shards.sharded, self._parents)
        blocks: list[_Block] = []
        for level in np.unique(self._levels[shards.sharded]).tolist():
            on_level = self._levels[shards.sharded] == level
            for kind, start, stop in (
                ("before early", np.zeros_like(early), early),
                ("before late", early, late),
                ("to the end", late, np.where(has_children, lengths, late)),
            ):
                rows = np.flatnonzero(on_level & (stop > start))
                _append(
                    blocks,
                    level=level,
                    kind=kind,
                    segments=shards.sharded[rows],
                    starts=self._starts[shards.sharded[rows]] + start[rows],
                    lengths=(stop - start)[rows],
                )
        return blocks

    def _cross_stages(self, pairs: Iterable[tuple[_Block, _Block]]) -> Stages:
        stages: list[AttentionStage[np.ndarray]] = []
        for queries, keys in pairs:
            ancestors = queries.segments
            for _ in range(queries.level - keys.level):
                ancestors = self._parents[ancestors]
            stage = _cross_stage(queries, ancestors, keys)
            if stage is None:
                continue
            if stages and (joined := _joined(stages[-1], stage)) is not None:
                stages[-1] = joined
            else:
                stages.append(stage)
        return tuple(stages)


def _append(
    blocks: list[_Block], *, segments: np.ndarray, offset: int = 0, **values: object
) -> None:
    """Add a block behind the last one, if it has runs."""
    if len(segments):
        start = blocks[-1].end if blocks else offset
        blocks.append(_Block(segments=segments, offset=start, **values))


def _positions(block: _Block) -> np.ndarray:
    """Positions in the packed row of a block's tokens."""
    return _ranges(block.starts, block.lengths)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The concatenation of arange(start, start + length)."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)


def _cross_stage(
    queries: _Block, ancestors: np.ndarray, keys: _Block
) -> AttentionStage[np.ndarray] | None:
    """Queries against the run of keys of their ancestor; None where no query has one."""
    run = np.searchsorted(keys.segments, ancestors)
    found = keys.segments[np.minimum(run, len(keys.segments) - 1)] == ancestors
    if not found.any():
        return None
    run = run[found]
    # Runs of keys without queries are only kept in between.
    first, last = run.min(), run.max()
    q_lengths = np.zeros(last - first + 1, dtype=np.int64)
    np.add.at(q_lengths, run - first, queries.lengths[found])
    k_lengths = keys.lengths[first : last + 1]
    k_start = keys.offset + int(keys.lengths[:first].sum())
    q_starts = queries.offset + np.cumsum(queries.lengths) - queries.lengths
    q_start = int(q_starts[found][0])
    q_stop = int(q_starts[found][-1] + queries.lengths[found][-1])
    rows: slice | np.ndarray = slice(q_start, q_stop)
    if q_stop - q_start != q_lengths.sum():
        rows = _ranges(q_starts[found], queries.lengths[found])
    return attention_stage(
        rows, slice(k_start, k_start + int(k_lengths.sum())), q_lengths, k_lengths, causal=False
    )


def _joined(
    first: AttentionStage[np.ndarray], second: AttentionStage[np.ndarray]
) -> AttentionStage[np.ndarray] | None:
    """Two stages as one, where both are one rectangle and their keys adjoin."""
    if len(first.on.cu_q) != 2 or len(second.on.cu_q) != 2:
        return None
    if not isinstance(first.queries, slice) or first.queries != second.queries:
        return None
    assert isinstance(first.keys, slice) and isinstance(second.keys, slice)
    if first.keys.stop != second.keys.start:
        return None
    keys = slice(first.keys.start, second.keys.stop)
    lengths = (np.array([rows.stop - rows.start]) for rows in (first.queries, keys))
    return attention_stage(first.queries, keys, *lengths, causal=False)
