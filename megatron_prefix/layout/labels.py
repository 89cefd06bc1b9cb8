"""Labels that each node of a tree scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_prefix.layout.tree_shape import TreeShape


def response_labels(tree: TreeShape) -> np.ndarray:
    """[nodes] int64: labels that are scored when the loss is on the responses only.

    All but those of a root that has children, which is the prompt. A root without children is a
    sequence that shares nothing; all of it counts.
    """
    labels = tree.packed_lengths.copy()
    labels[[p for p in set(tree.parents) if p >= 0 and tree.parents[p] < 0]] = 0
    return labels


def trained_labels(tree: TreeShape, first_trained: Sequence[int]) -> np.ndarray:
    """[nodes] int64: labels that are scored when each sequence is trained on from a token on.

    Args:
        tree: the sequences.
        first_trained: for each sequence the index of its first trained token, at least 1.
    """
    first = np.asarray(first_trained, dtype=np.int64)
    assert len(first) == tree.num_sequences
    earliest = tree.end_positions.copy()
    np.minimum.at(earliest, tree.path_nodes, first[tree.path_sequences])
    return np.minimum(tree.end_positions - earliest, tree.node_lengths)


def trained_labels_of_lengths(
    tree: TreeShape, spans: np.ndarray, trained: Sequence[int] | np.ndarray
) -> np.ndarray:
    """[nodes] int64: labels that are scored, where sequences differ in how many they train on.

    Args:
        tree: sequences that end in nodes of their own, which all of their trained tokens are in.
        spans: [nodes] from `trained_labels`.
        trained: for each sequence the number of its trained tokens.
    """
    labels = spans.copy()
    labels[[path[-1] for path in tree.sequences]] = trained
    assert (labels <= spans).all()
    return labels


def masked_labels(
    tree: TreeShape, first: Sequence[int], masks: Sequence[np.ndarray | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Labels that are scored where each sequence is trained on as its mask says.

    Args:
        tree: the sequences.
        first: for each sequence the index of the token that its mask begins with, at least 1.
        masks: for each sequence, from that token on, whether each is trained on; None: all are.

    Returns:
        [nodes] int64 each: scored labels of each node, which count once however many sequences
        train on them, and positions from each node's first scored one to its end.
    """
    starts = (tree.end_positions - tree.node_lengths).tolist()
    scored = [np.zeros(length, dtype=np.bool_) for length in tree.node_lengths.tolist()]
    for path, begin, mask in zip(tree.sequences, first, masks, strict=True):
        for node in path:
            skipped = starts[node] - begin
            of_node = scored[node]
            if len(of_node) + skipped <= 0:
                continue
            inside = of_node[max(0, -skipped) :]
            if mask is None:
                inside[:] = True
            else:
                at = max(0, skipped)
                inside |= mask[at : at + len(inside)]
    labels = np.array([values.sum() for values in scored], dtype=np.int64)
    spans = [len(values) - values.argmax() if values.any() else 0 for values in scored]
    return labels, np.array(spans, dtype=np.int64)
