"""One packed row for a prefix tree: its segments in level order, and the stages of its attention.

A segment holds the positions that predict its node's tokens. For a node with tokens t0 .. tn-1
below a path of p tokens that ends in token c:

    inputs        c    t0 ...  tn-2
    labels        t0   t1 ...  tn-1
    position ids  p-1  p  ...  p+n-2

A root has no c: its labels begin with t1. So no label lies in another segment than its input, and
the row has not one position more than the sequences need.

That is the row of shift 1. The row of shift k, which multi-token prediction needs, has the
positions that predict tokens k further on: a node has those of its paths whose label, k behind, is
one of its tokens. Its first min(k, p) positions lie in what is above it: such inputs are there
once for each child, each with the label of that child.

Invariants of a `PackedLayout`, with L the number of levels:

- every labelled token of the tree is in the row exactly once;
- level l is the slice [level_starts[l], level_starts[l + 1]), siblings adjacent and in the order of
  their parents, so the descendants of consecutive segments on any level are consecutive slices;
- over all stages, a query sees each position of its ancestors' segments, and of its own up to
  itself, exactly once, and nothing else;
- padding is one segment at the end of the row that sees only itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_prefix.layout.padding import padded_tokens
from megatron_prefix.layout.stages import AttentionStage, attention_stage
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
    """[T] int64, the token before each label: with shift 1, that of the position itself; 0 on
    padding."""
    labels: np.ndarray
    """[T] int64: the tokens `shift` behind the positions; 0 on padding."""
    position_ids: np.ndarray
    """[T] int64, counted along each sequence; 0 on padding."""
    multiplicity: np.ndarray
    """[T] int64: sequences that run through each position; 0 on padding."""
    stages: tuple[AttentionStage[np.ndarray], ...]
    """First the self stage over the whole row, then the cross stages, by level of the queries."""
    max_seqlen: int
    """Positions of the longest sequence, for the size of a table of position embeddings."""
    root_stage: AttentionStage[np.ndarray] | None = None
    """Where the tree's root ran in an earlier row: all segments against its keys, in their order
    there; else None."""
    shift: int = 1
    """How far behind its position a label is."""

    @cached_property
    def segment_starts(self) -> np.ndarray:
        """[segments] int64: the first position of each."""
        return np.array([s.start for s in self.segments], dtype=np.int64)

    @cached_property
    def _positions_of_node(self) -> dict[int, range]:
        return {s.node: range(s.start, s.start + s.length) for s in self.segments}

    def sequence_positions(self, i: int) -> np.ndarray:
        """[length - shift] int64: positions that predict tokens shift, shift + 1, ... of sequence
        `i`; none for a sequence that is not longer.

        So with shift 1 `labels[positions]` is the sequence without its first token and
        `input_ids[positions]` the sequence without its last.
        """
        runs = [self._positions_of_node.get(node, ()) for node in self.tree.sequences[i]]
        return np.concatenate([np.array(run, dtype=np.int64) for run in runs])

    def scatter(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """[..., T] values of the sequences' tokens, such as positions, at the inputs of the row.

        Args:
            values: of each sequence, [..., length]: a value for each of its tokens. That of the
                last token, which is no input, is not used. Padding gets 0.

        Raises:
            ValueError: there are not as many as sequences or tokens, or two sequences share a
                token and have different values for it.
        """
        lengths = self.tree.sequence_lengths.tolist()
        for i, of_sequence in enumerate(values[: len(lengths)]):
            expected = (*np.shape(values[0])[:-1], lengths[i])
            if of_sequence.shape != expected:
                raise ValueError(f"sequence {i}: values {of_sequence.shape}, expected {expected}")
        row = self.scatter_inputs([np.moveaxis(found[..., :-1], -1, 0) for found in values])
        return np.ascontiguousarray(np.moveaxis(row, 0, -1))

    def scatter_inputs(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """[T, ...] the same of values whose first axis are the inputs of each sequence.

        Args:
            values: of each sequence, [length - 1, ...]. Those of a root that ran in an earlier row
                are not used.

        Raises:
            ValueError: see `scatter`.
        """
        assert self.shift == 1, "inputs of other shifts are not theirs alone"
        tree = self.tree
        if len(values) != tree.num_sequences:
            raise ValueError(f"{len(values)} values for {tree.num_sequences} sequences")
        shape, dtype = values[0].shape[1:], values[0].dtype
        row = np.zeros((self.num_tokens, *shape), dtype=dtype)
        writers = np.full(self.num_tokens, -1)
        for i, (of_inputs, length) in enumerate(
            zip(values, tree.sequence_lengths.tolist(), strict=True)
        ):
            if of_inputs.shape != (length - 1, *shape):
                raise ValueError(
                    f"sequence {i}: values {of_inputs.shape}, expected {(length - 1, *shape)}"
                )
            positions = self.sequence_positions(i)
            elsewhere = length - 1 - len(positions)
            shared = np.flatnonzero(writers[positions] >= 0)
            before = row[positions[shared]] != of_inputs[shared + elsewhere]
            differs = before.any(axis=tuple(range(1, before.ndim)))
            if differs.any():
                token = int(shared[differs.argmax()])
                raise ValueError(
                    f"sequences {writers[positions[token]]} and {i} share token "
                    f"{token + elsewhere}, but have different values for it; only what is equal "
                    "can be shared: build the tree with keys of the tokens that differ there"
                )
            row[positions] = of_inputs[elsewhere:]
            writers[positions] = i
        return row


def pack(
    tree: PrefixTree,
    *,
    pad_to_multiple: int = 1,
    pad_to: int | None = None,
    root_elsewhere: bool = False,
    shift: int = 1,
) -> PackedLayout:
    """Lay a tree out as one row.

    A one-token root predicts nothing: it has no segment, and its children are on level 0; with a
    larger shift nodes that end within the first `shift` tokens of their paths. An empty tree gives
    a row of padding.

    Args:
        tree: the sequences.
        pad_to_multiple: the row's length becomes a multiple of this.
        pad_to: the row's exact length, a multiple of `pad_to_multiple`; None for the shortest.
        root_elsewhere: leave out the tree's only root, of at least two tokens: an earlier row has
            run it, and kept its keys and values (see `PackedLayout.root_stage`).
        shift: how far behind its position a label is, at least 1.

    Raises:
        ValueError: a `pad_to` that is too short or no multiple, or a `pad_to_multiple` below 1.
    """
    if pad_to_multiple < 1:
        raise ValueError(f"pad_to_multiple={pad_to_multiple} must be at least 1")
    assert shift >= 1
    segments, level_starts = _segments_in_level_order(tree, shift)
    num_root = 0
    if root_elsewhere:
        assert shift == 1, "one shift"
        num_root = segments[0].length
        segments, level_starts = _without_root(segments, level_starts)
    num_real = level_starts[-1]
    num_tokens = padded_tokens(num_real, pad_to_multiple)
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
    num_padding = num_tokens - num_real

    lengths = np.array([s.length for s in segments], dtype=np.int64)
    starts = np.array([s.start for s in segments], dtype=np.int64)

    labels = np.zeros(num_tokens, dtype=np.int64)
    input_ids = np.zeros(num_tokens, dtype=np.int64)
    position_ids = np.zeros(num_tokens, dtype=np.int64)
    multiplicity = np.zeros(num_tokens, dtype=np.int64)
    if segments:
        real = slice(0, num_real)
        # [-length:] leaves out the first tokens of a root, which has `shift` positions less.
        labels[real] = np.concatenate([tree.tokens[s.node][-s.length :] for s in segments])
        input_ids[1 : real.stop] = labels[: real.stop - 1]
        input_ids[starts] = [_first_input(tree, s) for s in segments]
        first_positions = np.array([s.first_position for s in segments], dtype=np.int64)
        position_ids[real] = np.arange(real.stop) - np.repeat(starts - first_positions, lengths)
        multiplicity[real] = np.repeat([s.multiplicity for s in segments], lengths)

    self_lengths = np.append(lengths, num_padding) if num_padding else lengths
    row = slice(0, num_tokens)
    self_stage = attention_stage(row, row, self_lengths, self_lengths, causal=True)
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
        root_stage=_root_stage(num_real, num_root) if num_root else None,
        shift=shift,
    )


def _without_root(
    segments: tuple[Segment, ...], level_starts: tuple[int, ...]
) -> tuple[tuple[Segment, ...], tuple[int, ...]]:
    """The segments and levels below the first segment, which is above all others."""
    root, *below = segments
    assert below and all(segment.level > 0 for segment in below), "one root, which goes on"
    moved = tuple(
        dataclasses.replace(
            segment,
            level=segment.level - 1,
            parent=segment.parent - 1,
            start=segment.start - root.length,
        )
        for segment in below
    )
    return moved, tuple(start - root.length for start in level_starts[1:])


def _root_stage(num_queries: int, num_keys: int) -> AttentionStage[np.ndarray]:
    """One rectangle: all queries of a row, and all keys of the root."""
    return attention_stage(
        slice(0, num_queries),
        slice(0, num_keys),
        np.array([num_queries]),
        np.array([num_keys]),
        causal=False,
    )


def _segments_in_level_order(
    tree: PrefixTree, shift: int
) -> tuple[tuple[Segment, ...], tuple[int, ...]]:
    """The segments, and where each level begins and the last one ends."""
    children: list[list[int]] = [[] for _ in range(tree.num_nodes)]
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            children[parent].append(node)
    starts = np.maximum(tree.end_positions - tree.node_lengths - shift, 0)
    lengths = np.maximum(tree.end_positions - shift - starts, 0).tolist()
    first_positions = starts.tolist()
    multiplicity = tree.multiplicity.tolist()

    def with_positions(node: int) -> list[int]:
        # A node without positions gives its place to its children.
        if lengths[node]:
            return [node]
        return [below for child in children[node] for below in with_positions(child)]

    segments: list[Segment] = []
    level_starts = [0]
    # (parent's segment, node) of the level at hand.
    level: list[tuple[int, int]] = []
    for root in (node for node, parent in enumerate(tree.parents) if parent < 0):
        level += [(-1, node) for node in with_positions(root)]
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


def _first_input(tree: PrefixTree, segment: Segment) -> int:
    """The token that a segment's first label follows."""
    tokens = tree.tokens[segment.node]
    if segment.length < len(tokens):
        return int(tokens[-segment.length - 1])
    return int(tree.tokens[tree.parents[segment.node]][-1])


def _cross_stages(
    segments: tuple[Segment, ...], level_starts: tuple[int, ...]
) -> list[AttentionStage[np.ndarray]]:
    """One stage for each pair of levels: the deeper one's queries, the other one's keys."""
    by_level: list[list[int]] = [[] for _ in level_starts[1:]]
    for index, segment in enumerate(segments):
        by_level[segment.level].append(index)
    stages: list[AttentionStage[np.ndarray]] = []
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
                    slice(level_starts[m], level_starts[m + 1]),
                    slice(level_starts[a], level_starts[a + 1]),
                    queries_of_key,
                    np.array([segments[index].length for index in keys]),
                    causal=False,
                )
            )
        stages += reversed(stages_of_level)
    return stages
