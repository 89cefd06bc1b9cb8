"""Forward FLOPs of multi-token prediction, which every depth adds to a tree.

Depth k runs a layer on the row of shift k: of each node the positions whose token k behind is the
node's. Its output layer scores the labels that the model's own does, but for those that nothing is
k + 1 before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_prefix.layout.cost import ModelShape
from megatron_prefix.layout.tree_shape import TreeShape


@dataclass(frozen=True, kw_only=True)
class PredictionFlops:
    """Forward FLOPs of all depths."""

    linear: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.attention + self.head


NO_PREDICTIONS = PredictionFlops(linear=0, attention=0, head=0)


def prediction_flops(
    model: ModelShape, tree: TreeShape, labels: np.ndarray
) -> list[PredictionFlops]:
    """[nodes] forward FLOPs of all depths for each node's tokens, computed once.

    Args:
        model: the sizes.
        tree: the sequences.
        labels: [nodes] int64, scored labels of each node, counted as its last ones.
    """
    ends = tree.end_positions
    return _of_runs(model, ends - tree.node_lengths, ends, labels)


def ungrouped_prediction_flops(
    model: ModelShape, tree: TreeShape, labels: np.ndarray
) -> PredictionFlops:
    """The same for the sequences one by one, all together."""
    ends = tree.sequence_lengths
    of_sequences = np.zeros_like(ends)
    np.add.at(of_sequences, tree.path_sequences, labels[tree.path_nodes])
    return total_of(_of_runs(model, np.zeros_like(ends), ends, of_sequences))


def total_of(flops: Sequence[PredictionFlops]) -> PredictionFlops:
    """The sum."""
    return PredictionFlops(
        linear=sum(of.linear for of in flops),
        attention=sum(of.attention for of in flops),
        head=sum(of.head for of in flops),
    )


def _of_runs(
    model: ModelShape, starts: np.ndarray, ends: np.ndarray, labels: np.ndarray
) -> list[PredictionFlops]:
    """[runs] of runs of tokens from `starts` to `ends` in their sequences, [runs] int64 each."""
    predictions = model.predictions
    if predictions is None:
        return [NO_PREDICTIONS] * len(starts)
    layer = dataclasses.replace(
        model,
        num_layers=1,
        num_moe_layers=int(predictions.experts),
        windowed_layers=(),
        recurrent_layers=(),
        predictions=None,
    )
    # The projection reads both norms' outputs.
    per_token = layer.linear_flops_per_token() + 4 * model.hidden_size**2
    per_pair, per_label = layer.attention_flops_per_pair(), model.head_flops_per_label()
    tokens, pairs, scored = np.zeros((3, len(starts)), dtype=np.int64)
    for depth in range(1, predictions.depths + 1):
        begins = np.maximum(starts, depth)
        rows = np.maximum(ends - begins, 0)
        windowed = any(predictions.windowed[depth - 1 : depth])
        tokens += rows
        pairs += layer.visible_pairs(rows, begins - depth, windowed=windowed)
        scored += np.minimum(labels, np.maximum(ends - np.maximum(starts, depth + 1), 0))
    return [
        PredictionFlops(linear=t * per_token, attention=p * per_pair, head=n * per_label)
        for t, p, n in zip(tokens.tolist(), pairs.tolist(), scored.tolist(), strict=True)
    ]
