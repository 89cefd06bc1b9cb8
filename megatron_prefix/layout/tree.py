"""The prefix tree: which runs of tokens a batch of sequences shares.

A node is a run of tokens that every sequence below it has in common. A GRPO group is a root (the
prompt) with one child per response; a shared system prompt or a branching dialogue is deeper.
A `PrefixTree` is a `TreeShape` with tokens. They cannot be written to, so that trees share them.

A token id does not always say what a model computes at its place: every image has the same
placeholder, and a replayed route is another one in another rollout. A tree can hold a key beside
each token, any whole number that stands for what the id leaves open. Tokens are the same where both
ids and keys are. A token without a key has key 0.
"""

from __future__ import annotations

import itertools
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
    keys: tuple[np.ndarray, ...] | None = None
    """int64: for each node the keys of its tokens; None: all are 0."""

    def __post_init__(self) -> None:
        assert all(t.dtype == np.int64 and t.ndim == 1 for t in self.tokens)
        lengths = np.array([len(tokens) for tokens in self.tokens], dtype=np.int64)
        if self.keys is not None:
            assert all(k.dtype == np.int64 for k in self.keys)
            assert [k.shape for k in self.keys] == [t.shape for t in self.tokens]
        object.__setattr__(self, "node_lengths", lengths)
        super().__post_init__()

    @classmethod
    def from_groups(
        cls,
        groups: Iterable[tuple[Sequence[int], Sequence[Sequence[int]]]],
        *,
        keys: Iterable[tuple[Sequence[int], Sequence[Sequence[int]]]] | None = None,
    ) -> PrefixTree:
        """Trees of depth two, one for each (prefix, responses).

        What is given as a group is what is shared: common beginnings of responses, or of the
        prefixes of different groups, are not looked for. `from_sequences` finds them.

        Args:
            groups: token ids of each group's prefix and of each of its responses.
            keys: the same of their keys; None: all are 0.

        Returns:
            The forest; its sequences are all responses of the first group, then of the second, ...

        Raises:
            ValueError: an empty prefix or response, a group without responses, or tokens that are
                not a flat list of integers, naming the group and the response; keys that are not
                one integer for each token.
        """
        names: list[str] = []
        parents: list[int] = []
        tokens: list[np.ndarray] = []
        sequences: list[tuple[int, ...]] = []
        for g, (prefix, responses) in enumerate(groups):
            root = len(parents)
            parents.append(-1)
            names.append(f"the prefix of group {g}")
            tokens.append(_integers(prefix, names[-1]))
            if len(responses) == 0:
                raise ValueError(f"group {g} has no responses; it needs at least one")
            for r, response in enumerate(responses):
                sequences.append((root, len(parents)))
                parents.append(root)
                names.append(f"response {r} of group {g}")
                tokens.append(_integers(response, names[-1]))
        flat_keys = None
        if keys is not None:
            flat_keys = [part for prefix, responses in keys for part in (prefix, *responses)]
        return cls(
            parents=tuple(parents),
            tokens=tuple(tokens),
            keys=_keys_like(tokens, flat_keys, names),
            sequences=tuple(sequences),
        )

    @classmethod
    def from_sequences(
        cls,
        sequences: Iterable[Sequence[int]],
        *,
        keys: Iterable[Sequence[int]] | None = None,
    ) -> PrefixTree:
        """The compressed trie of the sequences: every common prefix becomes shared, at any depth.

        Nodes are numbered by the first sequence that uses them, from its root on. Identical
        sequences share their whole path; a sequence that another one continues ends at an inner
        node. No node has a single child unless a sequence ends there.

        Args:
            sequences: token ids of each.
            keys: for each sequence a key for each of its tokens. Two sequences share their tokens
                up to the first where id or key differ. None: ids alone decide.

        Raises:
            ValueError: a sequence of fewer than two tokens (nothing to predict), or tokens that
                are not a flat list of integers, naming the sequence; keys that are not one integer
                for each token.
        """
        names: list[str] = []
        arrays: list[np.ndarray] = []
        for i, sequence in enumerate(sequences):
            names.append(f"sequence {i}")
            arrays.append(_integers(sequence, names[-1], at_least=2))
        key_arrays = _keys_like(arrays, None if keys is None else list(keys), names)
        if key_arrays is None:
            order, shared = _common_prefixes(arrays)
        else:
            order, shared = _common_prefixes(
                [np.stack(pair, axis=-1) for pair in zip(arrays, key_arrays, strict=True)]
            )
        lengths = [len(array) for array in arrays]
        shape = TreeShape.of_common_beginnings(lengths, order, shared)
        return cls.of_shape(shape, arrays, keys=key_arrays)

    @classmethod
    def of_shape(
        cls,
        shape: TreeShape,
        sequences: Sequence[np.ndarray],
        *,
        keys: Sequence[np.ndarray] | None = None,
    ) -> PrefixTree:
        """The tree of a shape, from the tokens of its sequences.

        Args:
            shape: says which tokens of the sequences are the same; it is not checked.
            sequences: all tokens of each sequence.
            keys: of the same tokens; None: all are 0.
        """
        return cls(
            parents=shape.parents,
            tokens=_of_nodes(shape, sequences),
            keys=None if keys is None else _of_nodes(shape, keys),
            sequences=shape.sequences,
        )

    @classmethod
    def _made_of(cls, trees: Sequence[PrefixTree], new: Regrouping) -> PrefixTree:
        keys = None
        if any(tree.keys is not None for tree in trees):
            keys = _joined_runs([part for tree in trees for part in tree._node_keys()], new.runs)
        return cls(
            parents=tuple(new.parents),
            tokens=_joined_runs([part for tree in trees for part in tree.tokens], new.runs),
            keys=keys,
            sequences=tuple(new.sequences),
        )

    def as_trie(self) -> PrefixTree:
        """The same sequences, with every prefix shared that some of them have in common."""
        indices = range(self.num_sequences)
        return PrefixTree.from_sequences(
            [self.sequence_tokens(i) for i in indices],
            keys=None if self.keys is None else [self.sequence_keys(i) for i in indices],
        )

    def with_root_of(self, length: int) -> PrefixTree:
        """The same sequences, node 0 with its first `length` tokens, and a node for its others."""
        if length == len(self.tokens[0]):
            return self
        # Node 1 is new; whatever hung on the root hangs on it.
        below = [1 if parent == 0 else parent + 1 if parent > 0 else -1 for parent in self.parents]
        return PrefixTree(
            parents=(-1, 0, *below[1:]),
            tokens=(*np.split(self.tokens[0], [length]), *self.tokens[1:]),
            keys=self.keys and (*np.split(self.keys[0], [length]), *self.keys[1:]),
            sequences=tuple(
                (0, *(node + 1 for node in path)) if path[0] == 0 else tuple(n + 1 for n in path)
                for path in self.sequences
            ),
        )

    def sequence_tokens(self, i: int) -> np.ndarray:
        """[length] int64: all tokens of sequence `i`, in an array of its own."""
        return np.concatenate([self.tokens[node] for node in self.sequences[i]])

    def sequence_keys(self, i: int) -> np.ndarray:
        """[length] int64: the keys of all tokens of sequence `i`, in an array of its own."""
        keys = self._node_keys()
        return np.concatenate([keys[node] for node in self.sequences[i]])

    def _node_keys(self) -> tuple[np.ndarray, ...]:
        return tuple(map(np.zeros_like, self.tokens)) if self.keys is None else self.keys


def _common_prefixes(arrays: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """The sequences in lexicographic order, and what each has in common with the one before it.

    There each sequence shares the most with its predecessor. All comparisons of tokens are over
    whole arrays.

    Args:
        arrays: [length], or [length, 2] where each token has a key.
    """
    # Records of eight or sixteen bytes compared byte by byte: not the order of the numbers, but an
    # order of the tokens, and a prefix comes before what continues it. That is all that is needed.
    order = sorted(range(len(arrays)), key=[a.tobytes() for a in arrays].__getitem__)
    shared = [_common_prefix(arrays[a], arrays[b]) for a, b in itertools.pairwise(order)]
    return order, [0, *shared][: len(order)]


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    if differs.ndim > 1:
        differs = differs.any(axis=1)
    return int(differs.argmax()) if differs.any() else n


def _of_nodes(shape: TreeShape, sequences: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """For each node the values of its tokens, given those of all tokens of each sequence."""
    ends = shape.end_positions.tolist()
    lengths = shape.node_lengths.tolist()
    found: dict[int, np.ndarray] = {}
    for path, values in zip(shape.sequences, sequences, strict=True):
        for node in path:
            if node not in found:
                found[node] = _frozen(values[ends[node] - lengths[node] : ends[node]])
    return tuple(found[node] for node in range(shape.num_nodes))


def _joined_runs(
    old: Sequence[np.ndarray], runs: Sequence[tuple[int, ...]]
) -> tuple[np.ndarray, ...]:
    """For each run of nodes their values, one behind the other."""
    return tuple(
        old[run[0]] if len(run) == 1 else _frozen(np.concatenate([old[n] for n in run]))
        for run in runs
    )


def _integers(
    values: Sequence[int], what: str, *, at_least: int = 1, kind: str = "token ids"
) -> np.ndarray:
    """Check token ids or keys, and copy them to an array that cannot be written to."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{what} is not a flat list of {kind}: {error}") from error
    if array.ndim != 1:
        raise ValueError(f"{what} is not a flat list of {kind}, its shape is {array.shape}")
    if array.size < at_least:
        found = "is empty" if array.size == 0 else f"has {array.size} token"
        raise ValueError(f"{what} {found}; it needs at least {at_least}")
    if array.dtype.kind not in "iu":
        raise ValueError(f"{what} holds {array.dtype}, {kind} are integers")
    return _frozen(array)


def _keys_like(
    tokens: Sequence[np.ndarray], keys: Sequence[Sequence[int]] | None, names: Sequence[str]
) -> tuple[np.ndarray, ...] | None:
    """Check that there is a key for each token.

    Args:
        tokens: of several nodes or sequences.
        keys: of the same; None: none are given.
        names: of the same, for errors.
    """
    if keys is None:
        return None
    if len(keys) != len(tokens):
        raise ValueError(f"keys: {len(keys)} lists for {len(tokens)} of tokens; give one for each")
    found = []
    for of_tokens, given, name in zip(tokens, keys, names, strict=True):
        array = _integers(given, f"keys of {name}", kind="keys")
        if len(array) != len(of_tokens):
            raise ValueError(
                f"keys of {name}: {len(array)} for {len(of_tokens)} tokens; give one for each"
            )
        found.append(array)
    return tuple(found)


def _frozen(array: np.ndarray) -> np.ndarray:
    copy = np.array(array, dtype=np.int64)
    copy.flags.writeable = False
    return copy
