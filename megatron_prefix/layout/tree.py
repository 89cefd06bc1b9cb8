"""The prefix tree: which runs of tokens a batch of sequences shares.

A node is a run of tokens that every sequence below it has in common. A GRPO group is a root (the
prompt) with one child per response; a shared system prompt or a branching dialogue is deeper.
A `PrefixTree` is a `TreeShape` with tokens. They cannot be written to, so that trees share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_prefix.layout.tree_shape import Regrouping, TreeShape


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefixTree(TreeShape):
    """A forest of shared token runs, and the sequences that are its paths.

    Users build one with `from_groups`, `from_sequences` or `concat`.
    """

    node_lengths: np.ndarray = field(init=False)
    tokens: tuple[np.ndarray, ...]
    """Tokens of each node, int64 and at least one."""

    def __post_init__(self) -> None:
        assert all(t.dtype == np.int64 and t.ndim == 1 for t in self.tokens)
        lengths = np.array([len(tokens) for tokens in self.tokens], dtype=np.int64)
        object.__setattr__(self, "node_lengths", lengths)
        super().__post_init__()

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
    def of_shape(cls, shape: TreeShape, sequences: Sequence[np.ndarray]) -> PrefixTree:
        """The tree of a shape, from the tokens of its sequences.

        Args:
            shape: says which tokens of the sequences are the same; it is not checked.
            sequences: all tokens of each sequence.
        """
        ends = shape.end_positions.tolist()
        lengths = shape.node_lengths.tolist()
        found: dict[int, np.ndarray] = {}
        for path, tokens in zip(shape.sequences, sequences, strict=True):
            for node in path:
                if node not in found:
                    found[node] = _frozen(tokens[ends[node] - lengths[node] : ends[node]])
        return cls(
            parents=shape.parents,
            tokens=tuple(found[node] for node in range(shape.num_nodes)),
            sequences=shape.sequences,
        )

    @classmethod
    def _made_of(cls, trees: Sequence[PrefixTree], new: Regrouping) -> PrefixTree:
        old = [tokens for tree in trees for tokens in tree.tokens]
        return cls(
            parents=tuple(new.parents),
            tokens=tuple(
                old[run[0]] if len(run) == 1 else _frozen(np.concatenate([old[n] for n in run]))
                for run in new.runs
            ),
            sequences=tuple(new.sequences),
        )

    def with_root_of(self, length: int) -> PrefixTree:
        """The same sequences, node 0 with its first `length` tokens, and a node for its others."""
        root, rest = np.split(self.tokens[0], [length])
        if not len(rest):
            return self
        # Node 1 is new; whatever hung on the root hangs on it.
        below = [1 if parent == 0 else parent + 1 if parent > 0 else -1 for parent in self.parents]
        return PrefixTree(
            parents=(-1, 0, *below[1:]),
            tokens=(root, rest, *self.tokens[1:]),
            sequences=tuple(
                (0, *(node + 1 for node in path)) if path[0] == 0 else tuple(n + 1 for n in path)
                for path in self.sequences
            ),
        )

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
