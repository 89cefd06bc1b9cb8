"""The prefix tree: which runs of tokens a batch of sequences shares.

A node is a run of tokens that every sequence below it has in common. A GRPO group is a root (the
prompt) with one child per response; a shared system prompt or a branching dialogue is deeper.
Invariants of a `PrefixTree`:

- a parent comes before its children, and no node is empty;
- every sequence is a path that starts at a root, and may end at any node;
- every node is on the path of some sequence;
- the nodes' tokens cannot be written to, so that trees share them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefixTree:
    """A forest of shared token runs, and the sequences that are its paths.

    Users build one with `from_groups`, `from_sequences` or `concat`.
    """

    parents: tuple[int, ...]
    """Parent of each node, -1 for a root."""
    tokens: tuple[np.ndarray, ...]
    """Tokens of each node, int64 and at least one."""
    sequences: tuple[tuple[int, ...], ...]
    """Nodes of each sequence from its root to its last node, in the caller's order."""

    def __post_init__(self) -> None:
        assert len(self.parents) == len(self.tokens)
        assert all(-1 <= parent < node for node, parent in enumerate(self.parents))
        assert all(t.dtype == np.int64 and t.ndim == 1 and t.size > 0 for t in self.tokens)
        assert all(
            self.parents[node] == parent
            for path in self.sequences
            for parent, node in zip((-1, *path), path, strict=False)
        )
        used = set().union(*self.sequences)
        assert len(used) == len(self.parents), "a node without sequences"
        assert not self.num_sequences or self.sequence_lengths.min() > 1

    @classmethod
    def from_groups(
        cls, groups: Iterable[tuple[Sequence[int], Sequence[Sequence[int]]]]
    ) -> PrefixTree:
        """Trees of depth two, one for each (prefix, responses).

        What is given as a group is what is shared: common beginnings of responses, or of the
        prefixes of different groups, are not looked for. `from_sequences` finds them.

        Args:
            groups: token ids of each group's prefix and of each of its responses.

        Returns:
            The forest; its sequences are all responses of the first group, then of the second, ...

        Raises:
            ValueError: an empty prefix or response, a group without responses, or tokens that are
                not a flat list of integers, naming the group and the response.
        """
        parents: list[int] = []
        tokens: list[np.ndarray] = []
        sequences: list[tuple[int, ...]] = []
        for g, (prefix, responses) in enumerate(groups):
            root = len(parents)
            parents.append(-1)
            tokens.append(_token_array(prefix, f"the prefix of group {g}"))
            if len(responses) == 0:
                raise ValueError(f"group {g} has no responses; it needs at least one")
            for r, response in enumerate(responses):
                sequences.append((root, len(parents)))
                parents.append(root)
                tokens.append(_token_array(response, f"response {r} of group {g}"))
        return cls(parents=tuple(parents), tokens=tuple(tokens), sequences=tuple(sequences))

    @classmethod
    def from_sequences(cls, sequences: Iterable[Sequence[int]]) -> PrefixTree:
        """The compressed trie of the sequences: every common prefix becomes shared, at any depth.

        Nodes are numbered by the first sequence that uses them, from its root on. Identical
        sequences share their whole path; a sequence that another one continues ends at an inner
        node. No node has a single child unless a sequence ends there.

        Raises:
            ValueError: a sequence of fewer than two tokens (nothing to predict), or tokens that
                are not a flat list of integers, naming the sequence.
        """
        arrays = [
            _token_array(sequence, f"sequence {i}", at_least=2)
            for i, sequence in enumerate(sequences)
        ]
        trie = _sorted_trie(arrays)
        # Renumber: follow each sequence's path up to the first node that an earlier one has named.
        number: dict[int, int] = {}
        parents: list[int] = []
        tokens: list[np.ndarray] = []
        paths: list[tuple[int, ...]] = []
        path_of_node: dict[int, tuple[int, ...]] = {-1: ()}
        for array, last in zip(arrays, trie.last_nodes, strict=True):
            new = []
            node = last
            while node not in path_of_node:
                new.append(node)
                node = trie.parents[node]
            for child in reversed(new):
                number[child] = len(parents)
                path_of_node[child] = (*path_of_node[node], number[child])
                parents.append(number.get(node, -1))
                start = trie.ends[node] if node >= 0 else 0
                tokens.append(_frozen(array[start : trie.ends[child]]))
                node = child
            paths.append(path_of_node[last])
        return cls(parents=tuple(parents), tokens=tuple(tokens), sequences=tuple(paths))

    @classmethod
    def concat(cls, trees: Iterable[PrefixTree]) -> PrefixTree:
        """One forest of several trees, their nodes and sequences in order. Nothing is merged."""
        parents: list[int] = []
        tokens: list[np.ndarray] = []
        sequences: list[tuple[int, ...]] = []
        for tree in trees:
            first = len(parents)
            parents.extend(p + first if p >= 0 else -1 for p in tree.parents)
            tokens.extend(tree.tokens)
            sequences.extend(tuple(node + first for node in path) for path in tree.sequences)
        return cls(parents=tuple(parents), tokens=tuple(tokens), sequences=tuple(sequences))

    def subset(self, sequence_indices: Iterable[int]) -> PrefixTree:
        """Only these sequences, in the order given, and the nodes that they use, in their order."""
        indices = tuple(sequence_indices)
        assert all(0 <= i < self.num_sequences for i in indices), "no such sequence"
        paths = [self.sequences[i] for i in indices]
        used = sorted(set().union(*paths))
        number = {-1: -1} | {node: new for new, node in enumerate(used)}
        return PrefixTree(
            parents=tuple(number[self.parents[node]] for node in used),
            tokens=tuple(self.tokens[node] for node in used),
            sequences=tuple(tuple(number[node] for node in path) for path in paths),
        )

    def separate(self) -> list[PrefixTree]:
        """Each sequence as a tree of its own."""
        return [self.subset([i]).merge_chains() for i in range(self.num_sequences)]

    def merge_chains(self) -> PrefixTree:
        """The same sequences with no needless borders: an only child becomes part of its parent.

        A node where a sequence ends keeps its border. What is left of a group that has one
        response is a single node, whose attention is one causal square as in an ordinary run.
        """
        num_children = np.zeros(self.num_nodes, dtype=np.int64)
        for parent in self.parents:
            if parent >= 0:
                num_children[parent] += 1
        ends = {path[-1] for path in self.sequences}
        chained = [num_children[node] == 1 and node not in ends for node in range(self.num_nodes)]
        if not any(chained):
            return self
        number: dict[int, int] = {-1: -1}
        runs: dict[int, list[np.ndarray]] = {}
        parents: list[int] = []
        tokens: list[np.ndarray] = []
        for node, parent in enumerate(self.parents):
            run = [*runs.get(parent, ()), self.tokens[node]]
            if chained[node]:
                # Its only child continues the run, below the same node as this one.
                runs[node] = run
                number[node] = number[parent]
                continue
            number[node] = len(parents)
            parents.append(number[parent])
            tokens.append(_frozen(np.concatenate(run)) if len(run) > 1 else run[0])
        sequences = tuple(
            tuple(number[node] for node in path if not chained[node]) for path in self.sequences
        )
        return PrefixTree(parents=tuple(parents), tokens=tuple(tokens), sequences=sequences)

    def without(self, nodes: Collection[int]) -> PrefixTree:
        """The same sequences with these nodes not shared: each child gets a copy of their tokens.

        A sequence that ends at such a node ends at a leaf of its own, which it shares with those
        that end there too.
        """
        if not nodes:
            return self
        number: dict[int, int] = {}
        parents: list[int] = []
        tokens: list[np.ndarray] = []
        paths: list[tuple[int, ...]] = []
        for old_path in self.sequences:
            path: list[int] = []
            run: list[np.ndarray] = []
            for node in old_path:
                run.append(self.tokens[node])
                if node in nodes and node != old_path[-1]:
                    continue
                if node not in number:
                    number[node] = len(parents)
                    parents.append(path[-1] if path else -1)
                    tokens.append(_frozen(np.concatenate(run)) if len(run) > 1 else run[0])
                path.append(number[node])
                run = []
            paths.append(tuple(path))
        return PrefixTree(parents=tuple(parents), tokens=tuple(tokens), sequences=tuple(paths))

    @property
    def num_nodes(self) -> int:
        """Nodes of the forest."""
        return len(self.parents)

    @property
    def num_sequences(self) -> int:
        """Sequences of the forest."""
        return len(self.sequences)

    @cached_property
    def node_lengths(self) -> np.ndarray:
        """[nodes] int64: tokens of each node."""
        return np.array([len(tokens) for tokens in self.tokens], dtype=np.int64)

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
        first = np.zeros(self.num_nodes, dtype=np.int64)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                first[node] = first[parent] + self.packed_lengths[parent]
        return first

    @cached_property
    def multiplicity(self) -> np.ndarray:
        """[nodes] int64: sequences through each node."""
        nodes = [node for path in self.sequences for node in path]
        return np.bincount(np.array(nodes, dtype=np.int64), minlength=self.num_nodes)

    @cached_property
    def sequence_lengths(self) -> np.ndarray:
        """[sequences] int64: tokens of each sequence."""
        lengths = self.node_lengths.tolist()
        return np.array([sum(lengths[n] for n in path) for path in self.sequences], dtype=np.int64)

    @property
    def grouped_tokens(self) -> int:
        """Tokens that a run over the tree computes, each shared one once, without padding."""
        return int(self.packed_lengths.sum())

    @property
    def ungrouped_tokens(self) -> int:
        """Tokens that a run over each sequence alone computes: its tokens but for the last."""
        return int(self.sequence_lengths.sum()) - self.num_sequences

    def sequence_tokens(self, i: int) -> np.ndarray:
        """[length] int64: all tokens of sequence `i`, in an array of its own."""
        return np.concatenate([self.tokens[node] for node in self.sequences[i]])


@dataclass(frozen=True, kw_only=True)
class _Trie:
    """Nodes in no particular order; node n holds the tokens from its parent's end to its own."""

    parents: list[int]
    ends: list[int]
    last_nodes: list[int]
    """The node where each sequence ends."""


def _sorted_trie(arrays: Sequence[np.ndarray]) -> _Trie:
    """Build the compressed trie from the sorted sequences and their neighbours' common prefixes.

    In lexicographic order each sequence shares the most with its predecessor, so one stack of the
    nodes on the predecessor's path suffices. All comparisons of tokens are over whole arrays.
    """
    # Records of eight bytes compared byte by byte: not the order of the numbers, but an order of
    # the tokens, and a prefix comes before what continues it. That is all the stack needs.
    order = sorted(range(len(arrays)), key=[a.tobytes() for a in arrays].__getitem__)
    parents: list[int] = []
    ends: list[int] = []
    last_nodes = [-1] * len(arrays)
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

    previous = np.zeros(0, dtype=np.int64)
    for i in order:
        array = arrays[i]
        shared = _common_prefix(previous, array)
        close_to(shared)
        if len(array) > shared:
            stack.append(len(parents))
            parents.append(-1)
            ends.append(len(array))
        last_nodes[i] = stack[-1]
        previous = array
    close_to(0)
    return _Trie(parents=parents, ends=ends, last_nodes=last_nodes)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


def _token_array(tokens: Sequence[int], what: str, *, at_least: int = 1) -> np.ndarray:
    """Check token ids and copy them to an array that cannot be written to."""
    try:
        array = np.asarray(tokens)
    except ValueError as error:
        raise ValueError(f"{what} is not a flat list of token ids: {error}") from error
    if array.ndim != 1:
        raise ValueError(f"{what} is not a flat list of token ids, its shape is {array.shape}")
    if array.size < at_least:
        found = "is empty" if array.size == 0 else f"has {array.size} token"
        raise ValueError(f"{what} {found}; it needs at least {at_least}")
    if array.dtype.kind not in "iu":
        raise ValueError(f"{what} holds {array.dtype}, token ids are integers")
    return _frozen(array)


def _frozen(array: np.ndarray) -> np.ndarray:
    copy = np.array(array, dtype=np.int64)
    copy.flags.writeable = False
    return copy
