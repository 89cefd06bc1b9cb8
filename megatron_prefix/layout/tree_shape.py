"""The shape of a prefix tree: how its nodes hang together and how long each is, without tokens.

All that a batch's plan depends on. Invariants of a `TreeShape`:

- a parent comes before its children, and no node is empty;
- every sequence is a path that starts at a root, and may end at any node;
- every node is on the path of some sequence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import TypeVar

import numpy as np

AnyTree = TypeVar("AnyTree", bound="TreeShape")
"""A shape, or a tree with tokens: what is made of it is of the same type."""


@dataclass(frozen=True, kw_only=True)
class Regrouping:
    """A tree made of the nodes of other trees, which are numbered through from the first tree on.

    Each operation on trees is one function to this; shapes and trees with tokens are made from it.
    """

    parents: Sequence[int]
    """Parent of each new node, -1 for a root."""
    runs: Sequence[tuple[int, ...]]
    """For each new node the old ones that it consists of, in their order."""
    sequences: Sequence[tuple[int, ...]]
    """New nodes of each sequence."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TreeShape:
    """A forest of token runs of known lengths, and the sequences that are its paths."""

    parents: tuple[int, ...]
    """Parent of each node, -1 for a root."""
    node_lengths: np.ndarray
    """[nodes] int64: tokens of each node, at least one."""
    sequences: tuple[tuple[int, ...], ...]
    """Nodes of each sequence from its root to its last node, in the caller's order."""

    def __post_init__(self) -> None:
        parents = self.parents
        assert self.node_lengths.dtype == np.int64 and len(self.node_lengths) == len(parents)
        assert not parents or self.node_lengths.min() > 0, "an empty node"
        assert all(-1 <= parent < node for node, parent in enumerate(parents))
        for path in self.sequences:
            above = -1
            for node in path:
                assert parents[node] == above, "a sequence that is no path"
                above = node
        assert len(set().union(*self.sequences)) == len(parents), "a node without sequences"
        lengths = self.node_lengths
        assert all(len(path) > 1 or lengths[path[0]] > 1 for path in self.sequences)

    @staticmethod
    def of_group(prefix_length: int, response_lengths: Sequence[int]) -> TreeShape:
        """One group: a root, the prefix, with a child for each response. Lengths are in tokens."""
        parents, sequences = _group_structure(len(response_lengths))
        lengths = np.empty(len(parents), dtype=np.int64)
        lengths[0], lengths[1:] = prefix_length, response_lengths
        return TreeShape(parents=parents, node_lengths=lengths, sequences=sequences)

    @staticmethod
    def of_common_beginnings(
        lengths: Sequence[int], order: Sequence[int], shared: Sequence[int]
    ) -> TreeShape:
        """The compressed trie of sequences that are known by how many tokens they share.

        Nodes are numbered by the first sequence that uses them, from its root on.

        Args:
            lengths: tokens of each sequence.
            order: the sequences so that each shares the most tokens with the one before it.
            shared: for each of them, in that order, tokens that it shares with the one before it.
        """
        trie = _sorted_trie([lengths[i] for i in order], shared)
        last_nodes = dict(zip(order, trie.last_nodes, strict=True))
        # Renumber: follow each sequence's path up to the first node that an earlier one has named.
        number: dict[int, int] = {-1: -1}
        parents: list[int] = []
        paths: list[tuple[int, ...]] = []
        path_of_node: dict[int, tuple[int, ...]] = {-1: ()}
        node_lengths: list[int] = []
        for sequence in range(len(lengths)):
            new = []
            node = last_nodes[sequence]
            while node not in path_of_node:
                new.append(node)
                node = trie.parents[node]
            for child in reversed(new):
                number[child] = len(parents)
                path_of_node[child] = (*path_of_node[node], number[child])
                parents.append(number[node])
                node_lengths.append(trie.ends[child] - (trie.ends[node] if node >= 0 else 0))
                node = child
            paths.append(path_of_node[last_nodes[sequence]])
        return TreeShape(
            parents=tuple(parents),
            node_lengths=np.array(node_lengths, dtype=np.int64),
            sequences=tuple(paths),
        )

    @classmethod
    def concat(cls: type[AnyTree], trees: Iterable[AnyTree]) -> AnyTree:
        """One forest of several trees, their nodes and sequences in order. Nothing is merged."""
        trees = tuple(trees)
        parents: list[int] = []
        sequences: list[tuple[int, ...]] = []
        for tree in trees:
            first = len(parents)
            parents.extend(p + first if p >= 0 else -1 for p in tree.parents)
            sequences.extend(tuple(node + first for node in path) for path in tree.sequences)
        runs = [(node,) for node in range(len(parents))]
        return cls._made_of(trees, Regrouping(parents=parents, runs=runs, sequences=sequences))

    @classmethod
    def _made_of(cls: type[AnyTree], trees: Sequence[AnyTree], new: Regrouping) -> AnyTree:
        lengths = [length for tree in trees for length in tree.node_lengths.tolist()]
        summed = [sum(lengths[node] for node in run) for run in new.runs]
        return cls(
            parents=tuple(new.parents),
            node_lengths=np.array(summed, dtype=np.int64),
            sequences=tuple(new.sequences),
        )

    def subset(self: AnyTree, sequence_indices: Iterable[int]) -> AnyTree:
        """Only these sequences, in the order given, and the nodes that they use, in their order."""
        indices = tuple(sequence_indices)
        assert all(0 <= i < self.num_sequences for i in indices), "no such sequence"
        paths = [self.sequences[i] for i in indices]
        used = sorted(set().union(*paths))
        number = {-1: -1} | {node: new for new, node in enumerate(used)}
        new = Regrouping(
            parents=[number[self.parents[node]] for node in used],
            runs=[(node,) for node in used],
            sequences=[tuple(number[node] for node in path) for path in paths],
        )
        return self._made_of([self], new)

    def separate(self: AnyTree) -> list[AnyTree]:
        """Each sequence as a tree of its own, of a single node."""
        alone = [Regrouping(parents=[-1], runs=[path], sequences=[(0,)]) for path in self.sequences]
        return [self._made_of([self], new) for new in alone]

    def merge_chains(self: AnyTree) -> AnyTree:
        """The same sequences with no needless borders: an only child becomes part of its parent.

        A node where a sequence ends keeps its border. What is left of a group that has one
        response is a single node, whose attention is one causal square as in an ordinary run.
        """
        num_children = [0] * self.num_nodes
        for parent in self.parents:
            if parent >= 0:
                num_children[parent] += 1
        ends = {path[-1] for path in self.sequences}
        chained = [count == 1 and node not in ends for node, count in enumerate(num_children)]
        if not any(chained):
            return self
        number: dict[int, int] = {-1: -1}
        begun: dict[int, tuple[int, ...]] = {}
        parents: list[int] = []
        runs: list[tuple[int, ...]] = []
        for node, parent in enumerate(self.parents):
            run = (*begun.get(parent, ()), node)
            if chained[node]:
                # Its only child continues the run, below the same node as this one.
                begun[node] = run
                number[node] = number[parent]
                continue
            number[node] = len(parents)
            parents.append(number[parent])
            runs.append(run)
        sequences = [
            tuple(number[node] for node in path if not chained[node]) for path in self.sequences
        ]
        return self._made_of([self], Regrouping(parents=parents, runs=runs, sequences=sequences))

    def without(self: AnyTree, nodes: Collection[int]) -> AnyTree:
        """The same sequences with these nodes not shared: each child gets a copy of their tokens.

        A sequence that ends at such a node ends at a leaf of its own, which it shares with those
        that end there too.
        """
        if not nodes:
            return self
        number: dict[int, int] = {}
        parents: list[int] = []
        runs: list[tuple[int, ...]] = []
        paths: list[tuple[int, ...]] = []
        for old_path in self.sequences:
            path: list[int] = []
            run: tuple[int, ...] = ()
            for node in old_path:
                run = (*run, node)
                if node in nodes and node != old_path[-1]:
                    continue
                if node not in number:
                    number[node] = len(parents)
                    parents.append(path[-1] if path else -1)
                    runs.append(run)
                path.append(number[node])
                run = ()
            paths.append(tuple(path))
        return self._made_of([self], Regrouping(parents=parents, runs=runs, sequences=paths))

    @property
    def num_nodes(self) -> int:
        """Nodes of the forest."""
        return len(self.parents)

    @property
    def num_sequences(self) -> int:
        """Sequences of the forest."""
        return len(self.sequences)

    @cached_property
    def packed_lengths(self) -> np.ndarray:
        """[nodes] int64: positions that predict each node's tokens.

        As many as it has tokens; one less for a root, whose first token nothing predicts.
        """
        return self.node_lengths - (np.array(self.parents, dtype=np.int64) < 0)

    @cached_property
    def first_positions(self) -> np.ndarray:
        """[nodes] int64: position id of the first input of each node's segment.

        It equals the packed tokens of the node's ancestors: what its segment sees besides itself.
        """
        lengths = self.packed_lengths.tolist()
        first = [0] * self.num_nodes
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                first[node] = first[parent] + lengths[parent]
        return np.array(first, dtype=np.int64)

    @cached_property
    def end_positions(self) -> np.ndarray:
        """[nodes] int64: tokens from the beginning of each node's root to the node's end."""
        return self.first_positions + self.packed_lengths + 1

    @cached_property
    def path_nodes(self) -> np.ndarray:
        """[nodes of all paths] int64: the nodes of each sequence, sequence by sequence."""
        return np.array([*chain.from_iterable(self.sequences)], dtype=np.int64)

    @cached_property
    def path_sequences(self) -> np.ndarray:
        """[nodes of all paths] int64: the sequence that each entry of `path_nodes` belongs to."""
        return np.repeat(np.arange(self.num_sequences), [len(path) for path in self.sequences])

    @cached_property
    def multiplicity(self) -> np.ndarray:
        """[nodes] int64: sequences through each node."""
        return np.bincount(self.path_nodes, minlength=self.num_nodes)

    @cached_property
    def sequence_lengths(self) -> np.ndarray:
        """[sequences] int64: tokens of each sequence."""
        return self.end_positions[np.array([path[-1] for path in self.sequences], dtype=np.int64)]

    @cached_property
    def grouped_tokens(self) -> int:
        """Tokens that a run over the tree computes, each shared one once, without padding."""
        return int(self.packed_lengths.sum())

    @property
    def ungrouped_tokens(self) -> int:
        """Tokens that a run over each sequence alone computes: its tokens but for the last."""
        return int(self.sequence_lengths.sum()) - self.num_sequences


@lru_cache(maxsize=64)
def _group_structure(responses: int) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Parents and sequences of a group: the same objects for all groups of a size."""
    return (-1, *[0] * responses), tuple((0, 1 + i) for i in range(responses))


@dataclass(frozen=True, kw_only=True)
class _Trie:
    """Nodes in no particular order; node n holds the tokens from its parent's end to its own."""

    parents: list[int]
    ends: list[int]
    last_nodes: list[int]
    """The node where each sequence ends."""


def _sorted_trie(lengths: Sequence[int], shared: Sequence[int]) -> _Trie:
    """The compressed trie of sequences each of which shares the most with its predecessor.

    So one stack of the nodes on the predecessor's path suffices.

    Args:
        lengths: of each.
        shared: tokens that each shares with its predecessor.
    """
    parents: list[int] = []
    ends: list[int] = []
    last_nodes: list[int] = []
    stack: list[int] = []

    def close_to(depth: int) -> None:
        # Take the nodes that reach below `depth` off the stack; cut the one that spans it.
        while stack and ends[stack[-1]] > depth:
            node = stack.pop()
            above = ends[stack[-1]] if stack else 0
            if above < depth:
                stack.append(len(parents))
                parents.append(-1)
                ends.append(depth)
            parents[node] = stack[-1] if stack else -1

    for length, common in zip(lengths, shared, strict=True):
        close_to(common)
        if length > common:
            stack.append(len(parents))
            parents.append(-1)
            ends.append(length)
        last_nodes.append(stack[-1])
    close_to(0)
    return _Trie(parents=parents, ends=ends, last_nodes=last_nodes)
