"""Forward FLOPs of a tree: of its nodes, of all with shared tokens computed once, and one by one.

What is counted stands in `cost.py`. `labels` and `spans` count each node's scored labels and the
positions from its first scored one to its end, see `labels.py`.
"""

from __future__ import annotations

import numpy as np

from megatron_prefix.layout.cost import ModelShape
from megatron_prefix.layout.labels import response_labels
from megatron_prefix.layout.pairs import attention_pairs, attention_pairs_of
from megatron_prefix.layout.prediction_cost import (
    prediction_flops,
    ungrouped_prediction_flops,
)
from megatron_prefix.layout.tree_shape import TreeShape


def node_flops(
    model: ModelShape,
    tree: TreeShape,
    *,
    labels: np.ndarray | None = None,
    spans: np.ndarray | None = None,
    trim_last_layer: bool = False,
) -> list[int]:
    """[nodes] forward FLOPs of each node's positions, computed once and without padding.

    Args:
        tree: the sequences.
        labels: [nodes], scored labels of each node; None: those of `response_labels`.
        spans: [nodes], positions from each node's first scored one to its end; None: as many as
            labels, which are a node's last then.
        trim_last_layer: a node's positions before its first scored one are left out of the
            last layer.
    """
    labels = response_labels(tree) if labels is None else labels
    spans = labels if spans is None else spans
    per_token, per_pair = model.linear_flops_per_token(), model.attention_flops_per_pair()
    per_windowed_pair = model.attention_flops_per_pair(windowed=True)
    per_label = model.head_flops_per_label()
    counts = zip(
        tree.packed_lengths.tolist(),
        attention_pairs(tree).tolist(),
        model.windowed_pairs(tree.packed_lengths, tree.first_positions).tolist(),
        labels.tolist(),
        strict=True,
    )
    flops = [
        t * per_token + p * per_pair + w * per_windowed_pair + n * per_label + further.total
        for (t, p, w, n), further in zip(counts, prediction_flops(model, tree, labels), strict=True)
    ]
    if not trim_last_layer:
        return flops
    saved = tree.packed_lengths - spans
    pairs = model.last_layer_pairs(saved, tree.first_positions)
    return [
        all_layers - model.last_layer_flops(tokens=t, pairs=p)
        for all_layers, t, p in zip(flops, saved.tolist(), pairs.tolist(), strict=True)
    ]


def tree_flops(
    model: ModelShape,
    tree: TreeShape,
    *,
    labels: np.ndarray | None = None,
    spans: np.ndarray | None = None,
    trim_last_layer: bool = False,
) -> int:
    """Forward FLOPs of a tree with every shared token computed once, without padding.

    The sum of `node_flops`, which see for the arguments.
    """
    return sum(node_flops(model, tree, labels=labels, spans=spans, trim_last_layer=trim_last_layer))


def ungrouped_flops(
    model: ModelShape,
    tree: TreeShape,
    *,
    labels: np.ndarray | None = None,
    spans: np.ndarray | None = None,
    trim_last_layer: bool = False,
) -> int:
    """Forward FLOPs of the same sequences one by one, causal and without padding.

    Args:
        tree: the sequences.
        labels, spans: as in `node_flops`; a node's labels are scored by each sequence through
            it.
        trim_last_layer: a sequence's positions before its first scored one are left out of
            the last layer.
    """
    labels = response_labels(tree) if labels is None else labels
    spans = labels if spans is None else spans
    lengths = tree.sequence_lengths - 1
    flops = model.flops(
        tokens=lengths.sum(),
        pairs=attention_pairs_of(lengths, 0).sum(),
        windowed_pairs=model.windowed_pairs(lengths, 0).sum(),
        labels=(labels * tree.multiplicity).sum(),
    )
    flops += ungrouped_prediction_flops(model, tree, labels).total
    if trim_last_layer:
        saved = _positions_before_the_first_label(tree, spans)
        flops -= model.last_layer_flops(
            tokens=saved.sum(), pairs=model.last_layer_pairs(saved, 0).sum()
        )
    return flops


def _positions_before_the_first_label(tree: TreeShape, spans: np.ndarray) -> np.ndarray:
    """[sequences] int64."""
    before = tree.sequence_lengths - 1
    first_label = np.where(spans > 0, tree.end_positions - 1 - spans, before.max(initial=0))
    np.minimum.at(before, tree.path_sequences, first_label[tree.path_nodes])
    return before
