"""One microbatch as tensors: the packed row, and what is trained on it.

Legend: T tokens of the row, N labelled positions (where some sequence trains on the label),
E entries. An entry is one trained token of one sequence; a position that several sequences share
(a response that branches) is one label and several entries, so each keeps its own advantage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.layout import PackedLayout
from megatron_prefix.packed_seq_params import PrefixPackedSeqParams


@dataclass(frozen=True, kw_only=True)
class TrainedSequence:
    """What the objective needs of one sequence of a packed layout."""

    first_trained: int
    """Index of the first trained token: the prompt's length."""
    weight: float
    """Of each of its trained tokens, over the global batch (see objective/weights.py)."""
    advantage: float
    old_logprobs: np.ndarray | None = None
    """[trained tokens], under the policy that sampled them; None: not known yet."""


@dataclass(kw_only=True)
class PackedBatch:
    """A microbatch on the device. `old_logprobs` and `reference_logprobs` may be filled later."""

    input_ids: Tensor
    """[1, T] int64"""
    position_ids: Tensor
    """[1, T] int64"""
    params: PrefixPackedSeqParams
    label_positions: Tensor
    """[N] int64: rows whose label is trained on, ascending."""
    labels: Tensor
    """[N] int64"""
    entry_labels: Tensor
    """[E] int64: index into the N labels."""
    sequence_ids: Tensor
    """[E] int64: sequence of this microbatch, 0 .. num_sequences - 1."""
    weights: Tensor
    """[E] float64"""
    advantages: Tensor
    """[E] float64"""
    num_sequences: int
    old_logprobs: Tensor | None = None
    """[E]"""
    reference_logprobs: Tensor | None = None
    """[E]"""

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.input_ids.shape[1]


def build_batch(
    layout: PackedLayout,
    sequences: Sequence[TrainedSequence],
    *,
    device: torch.device,
    kernel: str | None = None,
) -> PackedBatch:
    """Tensors of a packed layout and its sequences' training data.

    Args:
        layout: the packed row.
        sequences: one for each sequence of `layout.tree`, in its order.
        device: where the tensors go.
        kernel: attention kernel by name; None takes the best for the device.

    Raises:
        ValueError: a sequence's old log-probabilities do not match its trained tokens.
    """
    assert len(sequences) == layout.tree.num_sequences
    positions, ids, old = [], [], []
    for i, sequence in enumerate(sequences):
        # The position that predicts token j is entry j - 1 of the sequence's positions.
        trained = layout.sequence_positions(i)[sequence.first_trained - 1 :]
        positions.append(trained)
        ids.append(np.full(len(trained), i, dtype=np.int64))
        if sequence.old_logprobs is not None:
            if len(sequence.old_logprobs) != len(trained):
                raise ValueError(
                    f"sequence {i}: {len(sequence.old_logprobs)} old log-probabilities for "
                    f"{len(trained)} trained tokens"
                )
            old.append(np.asarray(sequence.old_logprobs, dtype=np.float64))
    entry_positions = np.concatenate(positions) if positions else np.zeros(0, dtype=np.int64)
    sequence_ids = np.concatenate(ids) if ids else np.zeros(0, dtype=np.int64)
    label_positions, entry_labels = np.unique(entry_positions, return_inverse=True)
    per_sequence = np.array([(s.weight, s.advantage) for s in sequences]).reshape(-1, 2)
    knows_old = bool(sequences) and len(old) == len(sequences)

    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)

    return PackedBatch(
        input_ids=on_device(layout.input_ids)[None],
        position_ids=on_device(layout.position_ids)[None],
        params=PrefixPackedSeqParams.from_layout(layout, device, kernel=kernel),
        label_positions=on_device(label_positions),
        labels=on_device(layout.labels[label_positions]),
        entry_labels=on_device(entry_labels.reshape(-1)),
        sequence_ids=on_device(sequence_ids),
        weights=on_device(per_sequence[sequence_ids, 0]),
        advantages=on_device(per_sequence[sequence_ids, 1]),
        num_sequences=len(sequences),
        old_logprobs=on_device(np.concatenate(old)) if knows_old else None,
    )
