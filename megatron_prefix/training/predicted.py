"""What multi-token prediction trains on in a rank's row, and its loss.

Depth k of D predicts the token k + 1 places after a position, by the model's own output layer.
Trained are the tokens that the policy's loss trains, by cross-entropy alone: rewards, old policies
and the temperature take no part. With N trained tokens in all sequences of an optimizer step,

    loss = mtp_loss_scaling_factor / D * sum over k of (1 / N) * sum of cross-entropies at depth k

Each token of each sequence counts once per depth, whatever its microbatch, rank or sharing. It is
Megatron's mean over the labels that the rolled mask leaves, taken over the whole step and, as the
policy's loss is, over the vocabulary without the rows that pad it. A token that
no position predicts from so far (in a sequence whose prompt is not longer than the depth) adds
nothing to the sum, and still counts in N.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.layout import CommType, PackedLayout
from megatron_prefix.layout.predictions import (
    DepthArrays,
    DepthPlan,
    plan_depths,
    shifted_layouts,
)
from megatron_prefix.layout.rows import own_values
from megatron_prefix.layout.stages import Array
from megatron_prefix.training.entries import TrainedSequence


@dataclass(frozen=True, kw_only=True)
class PredictionPlan:
    """What a run predicts beside the next token."""

    depths: int
    """D, at least 1."""
    step_tokens: int
    """N, at least 1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PredictedTokens(Generic[Array]):
    """What one depth trains on in this rank's row."""

    positions: Array
    """[M] int64 ascending: rows of the depth's output."""
    labels: Array
    """[M] int64"""
    weights: Array
    """[M] float64: of each cross-entropy, for all sequences that run through it; they add up to 1
    over the step, all ranks and depths, but for tokens that nothing predicts."""


PredictionArrays = tuple[DepthArrays[Array], PredictedTokens[Array]]


@dataclass(frozen=True, kw_only=True, eq=False)
class HostPredictions:
    """One depth on the host."""

    plan: DepthPlan
    tokens: PredictedTokens[np.ndarray]

    @property
    def arrays(self) -> PredictionArrays[np.ndarray]:
        """All that goes to the device."""
        return self.plan.arrays, self.tokens


def plan_predictions(
    layout: PackedLayout,
    sequences: Sequence[TrainedSequence],
    prediction: PredictionPlan,
    *,
    rank: int,
    num_ranks: int,
    comm_types: Collection[CommType],
    window: int | None,
) -> tuple[HostPredictions, ...]:
    """Plan this rank's part of every depth.

    Args:
        layout: the packed row, of shift 1.
        sequences: one for each sequence of `layout.tree`, in its order.
        prediction: of the run and the optimizer step.
        rank, num_ranks, comm_types, window: as for `plan_batch`.
    """
    layouts = shifted_layouts(layout, prediction.depths)
    plans = plan_depths(
        layouts, rank=rank, num_ranks=num_ranks, comm_types=comm_types, window=window
    )
    total = prediction.step_tokens * prediction.depths
    found = []
    for plan, following in zip(plans, layouts[1:], strict=True):
        counts = own_values(_counts(following, sequences), plan.following.rows)
        positions = np.flatnonzero(counts)
        found.append(
            HostPredictions(
                plan=plan,
                tokens=PredictedTokens(
                    positions=positions,
                    labels=plan.following.labels[positions],
                    weights=counts[positions] / total,
                ),
            )
        )
    return tuple(found)


def _counts(layout: PackedLayout, sequences: Sequence[TrainedSequence]) -> np.ndarray:
    """[T] int64: how many sequences train the label of each row."""
    counts = np.zeros(layout.num_tokens, dtype=np.int64)
    for i, (sequence, length) in enumerate(
        zip(sequences, layout.tree.sequence_lengths.tolist(), strict=True)
    ):
        if sequence.weight == 0:
            continue
        trained = np.arange(length - sequence.first_trained)
        if sequence.loss_mask is not None:
            trained = np.flatnonzero(sequence.loss_mask)
        places = trained + sequence.first_trained - layout.shift
        # A sequence has each of its rows once.
        counts[layout.sequence_positions(i)[places[places >= 0]]] += 1
    return counts


def prediction_loss(
    logprobs: Tensor, tokens: Sequence[PredictedTokens[Tensor]]
) -> tuple[Tensor, Tensor]:
    """The weighted cross-entropy of all depths, without the coefficient, and the sum of weights.

    Args:
        logprobs: [M of all depths] log-probabilities of their labels, depth after depth.
        tokens: of each depth.
    """
    weights = torch.cat([of_depth.weights for of_depth in tokens])
    return -(weights.to(logprobs.dtype) * logprobs).sum(), weights.sum()
