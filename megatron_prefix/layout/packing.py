"""One packed row for a prefix tree: its segments in level order, and the stages of its attention.

A segment holds the positions that predict its node's tokens. For a node with tokens t0 .. tn-1
below a path of p tokens that ends in token c:

    inputs        c    t0 ...  tn-2
    labels        t0   t1 ...  tn-1
    position ids  p-1  p  ...  p+n-2

A root has no c: its labels begin with t1. So no label lies in another segment than its input, and
the row has not one position more than the sequences need.

Invariants of a `PackedLayout`, with L the number of levels:

- every labelled token of the tree is in the row exactly once;
- level l is the slice [level_starts[l], level_starts[l + 1]), siblings adjacent and in the order of
  their parents, so the descendants of consecutive segments on any level are consecutive slices;
- over all stages, a query sees each position of its ancestors' segments, and of its own up to
  itself, exactly once, and nothing else;
- padding is one segment at the end of the row that sees only itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_prefix.layout.cost import activation_tokens
from megatron_prefix.layout.tree import PrefixTree


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The positions of the row that predict one node's tokens."""

    node: int
    """Node of the tree."""
    level: int
    """Segments above it, 0 for one that sees only itself."""
    parent: int
    """Segment above it, -1 on level 0."""
    start: int
    """First position in the row."""
    length: int
    """Positions, at least one."""
    first_position: int
    """Position id of its first input: how many positions of its ancestors it sees."""
    multiplicity: int
    """Sequences that run through it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionStage:
    """One variable-length attention call on contiguous slices of the row.

    Rectangle i has queries [cu_q[i], cu_q[i + 1]) and keys [cu_k[i], cu_k[i + 1]), counted from
    `q_start` and `k_start`. It may have no queries (a segment without descendants on the queries'
    level), never no keys.
    """

    causal: bool
    """True for the self stage, whose rectangles are squares; False for full rectangles."""
    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    cu_q: np.ndarray
    """[rectangles + 1] int32"""
    cu_k: np.ndarray
    """[rectangles + 1] int32"""
    max_q: int
    """Queries of the longest rectangle."""
    max_k: int
    """Keys of the longest rectangle."""
    query_rows: np.ndarray | None = None
    """[cu_q[-1]] int64: the queries' rows where they are no slice; `q_start`, `q_stop` enclose
    them."""
    key_rows: np.ndarray | None = None
    """[cu_k[-1]] int64: the same of the keys."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedLayout:
    """A tree as one row of T tokens, padding included."""

    tree: PrefixTree
    segments: tuple[Segment, ...]
    """In the row's order, without the padding."""
    level_starts: tuple[int, ...]
    """[levels + 1] positions: where each level begins, and where the last one ends."""
    num_tokens: int
    """T, padding included."""
    num_padding: int
    input_ids: np.ndarray
    """[T] int64; 0 on padding."""
    labels: np.ndarray
    """[T] int64; 0 on padding."""
    position_ids: np.ndarray
    """[T] int64, counted along each sequence; 0 on padding."""
    multiplicity: np.ndarray
    """[T] int64: sequences that run through each position; 0 on padding."""
    stages: tuple[AttentionStage, ...]
    """First the self stage over the whole row, then the cross stages, by level of the queries."""
    max_seqlen: int
    """Positions of the longest sequence, for the size of a table of position embeddings."""

    @cached_property
    def _positions_of_node(self) -> dict[int, range]:
        return {s.node: range(s.start, s.start + s.length) for s in self.segments}

    def sequence_positions(self, i: int) -> np.ndarray:
        """[length - 1] int64: positions that predict tokens 1, 2, ... of sequence `i`.

        So `labels[positions]` is the sequence without its first token and `input_ids[positions]`
        the sequence without its last.
        """
        runs = [self._positions_of_node.get(node, ()) for node in self.tree.sequences[i]]
        return np.concatenate([np.array(run, dtype=np.int64) for run in runs])


def pack(tree: PrefixTree, *, pad_to_multiple: int = 1, pad_to: int | None = None) -> PackedLayout:
    """Lay a tree out as one row.

    A one-token root predicts nothing: it has no segment, and its children are on level 0. An empty
    tree gives a row of padding.

    Args:
        tree: the sequences.
        pad_to_multiple: the row's length becomes a multiple of this.
        pad_to: the row's exact length, a multiple of `pad_to_multiple`; None for the shortest.

    Raises:
        ValueError: a `pad_to` that is too short or no multiple, or a `pad_to_multiple` below 1.
    """
    if pad_to_multiple < 1:
        raise ValueError(f"pad_to_multiple={pad_to_multiple} must be at least 1")
    num_tokens = activation_tokens(tree, pad_to_multiple=pad_to_multiple)
    if pad_to is not None:
        if pad_to < num_tokens:
            raise ValueError(
                f"pad_to={pad_to} is too short for the tree, which packs to {num_tokens} tokens "
                f"with pad_to_multiple={pad_to_multiple}"
            )
        if pad_to % pad_to_multiple:
            raise ValueError(
                f"pad_to={pad_to} must be a multiple of pad_to_multiple={pad_to_multiple}"
            )
        num_tokens = pad_to
    num_padding = num_tokens - tree.grouped_tokens

    segments, level_starts = _segments_in_level_order(tree)
    lengths = np.array([s.length for s in segments], dtype=np.int64)
    starts = np.array([s.start for s in segments], dtype=np.int64)

    labels = np.zeros(num_tokens, dtype=np.int64)
    input_ids = np.zeros(num_tokens, dtype=np.int64)
    position_ids = np.zeros(num_tokens, dtype=np.int64)
    multiplicity = np.zeros(num_tokens, dtype=np.int64)
    if segments:
        row = slice(0, tree.grouped_tokens)
        # [-length:] leaves out the first token of a root, which has one position less than tokens.
        labels[row] = np.concatenate([tree.tokens[s.node][-s.length :] for s in segments])
        input_ids[1 : row.stop] = labels[: row.stop - 1]
        input_ids[starts] = [_first_input(tree, s.node) for s in segments]
        first_positions = np.array([s.first_position for s in segments], dtype=np.int64)
        position_ids[row] = np.arange(row.stop) - np.repeat(starts - first_positions, lengths)
        multiplicity[row] = np.repeat([s.multiplicity for s in segments], lengths)

    self_lengths = np.append(lengths, num_padding) if num_padding else lengths
    self_stage = attention_stage(
        (0, num_tokens), (0, num_tokens), self_lengths, self_lengths, causal=True
    )
    return PackedLayout(
        tree=tree,
        segments=segments,
        level_starts=level_starts,
        num_tokens=num_tokens,
        num_padding=num_padding,
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        multiplicity=multiplicity,
        stages=(self_stage, *_cross_stages(segments, level_starts)),
        max_seqlen=int(position_ids.max()) + 1,
    )


def _segments_in_level_order(tree: PrefixTree) -> tuple[tuple[Segment, ...], tuple[int, ...]]:
    """The segments, and where each level begins and the last one ends."""
    children: list[list[int]] = [[] for _ in range(tree.num_nodes)]
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            children[parent].append(node)
    lengths = tree.packed_lengths.tolist()
    first_positions = tree.first_positions.tolist()
    multiplicity = tree.multiplicity.tolist()

    segments: list[Segment] = []
    level_starts = [0]
    # (parent's segment, node) of the level at hand; an empty root gives its place to its children.
    level: list[tuple[int, int]] = []
    for root in (node for node, parent in enumerate(tree.parents) if parent < 0):
        level += [(-1, n) for n in ([root] if lengths[root] else children[root])]
    start = 0
    while level:
        below: list[tuple[int, int]] = []
        for parent, node in level:
            below += [(len(segments), child) for child in children[node]]
            segments.append(
                Segment(
                    node=node,
                    level=len(level_starts) - 1,
                    parent=parent,
                    start=start,
                    length=lengths[node],
                    first_position=first_positions[node],
                    multiplicity=multiplicity[node],
                )
            )
            start += lengths[node]
        level_starts.append(start)
        level = below
    return tuple(segments), tuple(level_starts)


def _first_input(tree: PrefixTree, node: int) -> int:
    """The token that a node's first label follows."""
    parent = tree.parents[node]
    return int(tree.tokens[node][0] if parent < 0 else tree.tokens[parent][-1])


def _cross_stages(
    segments: tuple[Segment, ...], level_starts: tuple[int, ...]
) -> list[AttentionStage]:
    """One stage for each pair of levels: the deeper one's queries, the other one's keys."""
    by_level: list[list[int]] = [[] for _ in level_starts[1:]]
    for index, segment in enumerate(segments):
        by_level[segment.level].append(index)
    stages: list[AttentionStage] = []
    for m in range(1, len(by_level)):
        q_lengths = [segments[index].length for index in by_level[m]]
        # The segments of level m's queries on level m-1, m-2, ..., 0.
        ancestors = by_level[m]
        stages_of_level = []
        for a in range(m - 1, -1, -1):
            ancestors = [segments[index].parent for index in ancestors]
            keys = by_level[a]
            queries_of_key = np.zeros(len(keys), dtype=np.int64)
            np.add.at(queries_of_key, np.array(ancestors) - keys[0], q_lengths)
            stages_of_level.append(
                attention_stage(
                    (level_starts[m], level_starts[m + 1]),
                    (level_starts[a], level_starts[a + 1]),
                    queries_of_key,
                    np.array([segments[index].length for index in keys]),
                    causal=False,
                )
            )
        stages += reversed(stages_of_level)
    return stages


def attention_stage(
    queries: tuple[int, int],
    keys: tuple[int, int],
    q_lengths: np.ndarray,
    k_lengths: np.ndarray,
    *,
    causal: bool,
    query_rows: np.ndarray | None = None,
    key_rows: np.ndarray | None = None,
) -> AttentionStage:
    """A stage from the bounds of its queries and keys and its rectangles' lengths."""
    cu_q = np.append(0, np.cumsum(q_lengths)).astype(np.int32)
    cu_k = np.append(0, np.cumsum(k_lengths)).astype(np.int32)
    assert cu_q[-1] == (queries[1] - queries[0] if query_rows is None else len(query_rows))
    assert cu_k[-1] == (keys[1] - keys[0] if key_rows is None else len(key_rows))
    return AttentionStage(
        causal=causal,
        q_start=queries[0],
        q_stop=queries[1],
        k_start=keys[0],
        k_stop=keys[1],
        cu_q=cu_q,
        cu_k=cu_k,
        max_q=int(q_lengths.max()),
        max_k=int(k_lengths.max()),
        query_rows=query_rows,
        key_rows=key_rows,
    )
