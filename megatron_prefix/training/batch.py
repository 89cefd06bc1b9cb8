"""One microbatch as tensors: the packed row, and what is trained on it.

Legend: T tokens of the row, N labelled positions (where some sequence trains on the label),
E entries. An entry is one trained token of one sequence; a position that several sequences share
(a response that branches) is one label and several entries, so each keeps its own advantage.

Under context parallelism all of these are what this rank holds of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.device_copy import copy_to_device
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layout import PackedLayout


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
    """[N] int64: rows of the model's output whose label is trained on, ascending."""
    labels: Tensor
    """[N] int64"""
    entry_labels: Tensor
    """[E] int64: index into the N labels."""
    sequence_ids: Tensor
    """[E] int64: sequence of this microbatch, 0 .. num_sequences - 1."""
    sequence_tokens: Tensor
    """[E] int64: which of its sequence's trained tokens each is, from 0."""
    weights: Tensor
    """[E] float64"""
    advantages: Tensor
    """[E] float64"""
    num_sequences: int
    context_parallel_group: dist.ProcessGroup | None = None
    """The ranks that the row is distributed over; None: all of it is here."""
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
    deterministic: bool = False,
    context_parallel_group: dist.ProcessGroup | None = None,
    check_equal: bool = True,
    trim_last_layer: bool = False,
    output_multiple: int = 1,
) -> PackedBatch:
    """Tensors of a packed layout and its sequences' training data.

    Args:
        layout: the packed row.
        sequences: one for each sequence of `layout.tree`, in its order.
        device: where the tensors go.
        kernel, deterministic, context_parallel_group, check_equal: see
            `PrefixPackedSeqParams.from_layout`.
        trim_last_layer: the model's output has only the rows that are trained on (and some that
            come with them), and its last layer computes no others; see
            `PrefixPackedSeqParams.trim_last_layer`.
        output_multiple: such an output's length is a multiple of this.

    Raises:
        ValueError: a sequence's old log-probabilities do not match its trained tokens.
    """
    assert len(sequences) == layout.tree.num_sequences
    params = PrefixPackedSeqParams.from_layout(
        layout,
        device,
        kernel=kernel,
        deterministic=deterministic,
        context_parallel_group=context_parallel_group,
        check_equal=check_equal,
    )
    entries = _all_entries(layout, sequences)
    # Where this rank has each position of the row, -1 for those of other ranks.
    places = np.full(layout.num_tokens, -1, dtype=np.int64)
    rows = params.own_rows
    places[rows[rows >= 0]] = np.flatnonzero(rows >= 0)
    entries = entries.select(places[entries.positions] >= 0)
    label_positions, entry_labels = np.unique(places[entries.positions], return_inverse=True)
    output_positions = label_positions
    if trim_last_layer:
        output_rows = params.trim_last_layer(label_positions, multiple=output_multiple)
        output_positions = np.searchsorted(output_rows, label_positions)
    per_sequence = np.array([(s.weight, s.advantage) for s in sequences]).reshape(-1, 2)

    arrays = {
        "input_ids": params.own_values(layout.input_ids)[None],
        "label_positions": output_positions,
        "labels": layout.labels[rows[label_positions]],
        "entry_labels": entry_labels.reshape(-1),
        "sequence_ids": entries.sequences,
        "sequence_tokens": entries.tokens,
        "weights": per_sequence[entries.sequences, 0],
        "advantages": per_sequence[entries.sequences, 1],
    }
    if entries.old_logprobs is not None:
        arrays["old_logprobs"] = entries.old_logprobs
    return PackedBatch(
        position_ids=params.position_ids[None],
        params=params,
        num_sequences=len(sequences),
        context_parallel_group=context_parallel_group,
        **dict(zip(arrays, copy_to_device(list(arrays.values()), device), strict=True)),
    )


@dataclass(frozen=True, kw_only=True)
class _Entries:
    """[E] each, sequence by sequence."""

    positions: np.ndarray
    """In the packed row."""
    sequences: np.ndarray
    tokens: np.ndarray
    old_logprobs: np.ndarray | None

    def select(self, chosen: np.ndarray) -> _Entries:
        old = self.old_logprobs
        return _Entries(
            positions=self.positions[chosen],
            sequences=self.sequences[chosen],
            tokens=self.tokens[chosen],
            old_logprobs=None if old is None else old[chosen],
        )


def _all_entries(layout: PackedLayout, sequences: Sequence[TrainedSequence]) -> _Entries:
    """The trained tokens of every sequence of the row."""
    none = np.zeros(0, dtype=np.int64)
    positions, ids, tokens, old = [none], [none], [none], [np.zeros(0)]
    for i, sequence in enumerate(sequences):
        # The position that predicts token j is entry j - 1 of the sequence's positions.
        trained = layout.sequence_positions(i)[sequence.first_trained - 1 :]
        positions.append(trained)
        ids.append(np.full(len(trained), i, dtype=np.int64))
        tokens.append(np.arange(len(trained)))
        if sequence.old_logprobs is not None:
            if len(sequence.old_logprobs) != len(trained):
                raise ValueError(
                    f"sequence {i}: {len(sequence.old_logprobs)} old log-probabilities for "
                    f"{len(trained)} trained tokens"
                )
            old.append(np.asarray(sequence.old_logprobs, dtype=np.float64))
    knows_old = bool(sequences) and len(old) == len(sequences) + 1
    return _Entries(
        positions=np.concatenate(positions),
        sequences=np.concatenate(ids),
        tokens=np.concatenate(tokens),
        old_logprobs=np.concatenate(old) if knows_old else None,
    )
