"""What is trained on in a packed row: an entry is one trained token of one sequence.

A position that several sequences share (a response that branches) is several entries, so each keeps
its own weight and advantage.

Legend: E entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_prefix.layout import PackedLayout


@dataclass(frozen=True, kw_only=True)
class TrainedSequence:
    """What the objective needs of one sequence of a packed layout."""

    first_trained: int
    """Index of the first trained token: the prompt's length."""
    weight: float
    """Of each of its trained tokens, over the global batch (see objective/weights.py)."""
    advantage: float
    """Of each of its trained tokens, where `token_advantages` has none."""
    token_advantages: np.ndarray | None = None
    """[tokens from the first trained one on]"""
    old_logprobs: np.ndarray | None = None
    """[trained tokens], under the policy that sampled them; None: not known yet."""
    loss_mask: np.ndarray | None = None
    """[tokens from the first trained one on] whether each is trained on; None: all are."""


@dataclass(frozen=True, kw_only=True)
class RowEntries:
    """What is trained on in a whole packed row: [E] each, sequence by sequence."""

    positions: np.ndarray
    """int64: in the packed row."""
    sequences: np.ndarray
    """int64: sequence of the row."""
    tokens: np.ndarray
    """int64: which of its sequence's tokens from the first trained one on each is."""
    weights: np.ndarray
    """float64"""
    advantages: np.ndarray
    """float64"""
    old_logprobs: np.ndarray | None
    """float64; None: not known yet."""

    def select(self, chosen: np.ndarray) -> RowEntries:
        """Only these entries, [E] bool."""
        old = self.old_logprobs
        return RowEntries(
            positions=self.positions[chosen],
            sequences=self.sequences[chosen],
            tokens=self.tokens[chosen],
            weights=self.weights[chosen],
            advantages=self.advantages[chosen],
            old_logprobs=None if old is None else old[chosen],
        )


def row_entries(layout: PackedLayout, sequences: Sequence[TrainedSequence]) -> RowEntries:
    """The trained tokens of every sequence of a row.

    Args:
        layout: the packed row.
        sequences: one for each sequence of `layout.tree`, in its order.

    Raises:
        ValueError: a sequence's old log-probabilities, advantages or loss mask do not match its
            tokens.
    """
    assert len(sequences) == layout.tree.num_sequences
    none = np.zeros(0, dtype=np.int64)
    positions, ids, tokens = [none], [none], [none]
    old, advantages = [np.zeros(0)], [np.zeros(0)]
    lengths = layout.tree.sequence_lengths.tolist()
    for i, sequence in enumerate(sequences):
        # Positions predict the tokens that follow them; the last ones are those of the response.
        length = lengths[i] - sequence.first_trained
        places = layout.sequence_positions(i)
        places = places[len(places) - length :]
        chosen = np.arange(length)
        if sequence.loss_mask is not None:
            chosen = np.flatnonzero(_of_length(length, i, "loss mask", sequence.loss_mask))
        positions.append(places[chosen])
        ids.append(np.full(len(chosen), i, dtype=np.int64))
        tokens.append(chosen)
        if sequence.token_advantages is None:
            advantages.append(np.full(len(chosen), sequence.advantage))
        else:
            values = _of_length(length, i, "advantages", sequence.token_advantages)
            advantages.append(values[chosen])
        if sequence.old_logprobs is not None:
            values = _of_length(length, i, "old log-probabilities", sequence.old_logprobs)
            old.append(values[chosen].astype(np.float64))
    of_entry = np.concatenate(ids)
    knows_old = bool(sequences) and len(old) == len(sequences) + 1
    return RowEntries(
        positions=np.concatenate(positions),
        sequences=of_entry,
        tokens=np.concatenate(tokens),
        weights=np.array([s.weight for s in sequences], dtype=np.float64)[of_entry],
        advantages=np.concatenate(advantages),
        old_logprobs=np.concatenate(old) if knows_old else None,
    )


def _of_length(length: int, sequence: int, what: str, values: np.ndarray) -> np.ndarray:
    if len(values) != length:
        raise ValueError(
            f"sequence {sequence}: {len(values)} values of its {what} for {length} tokens from its "
            "first trained one on"
        )
    return np.asarray(values)
