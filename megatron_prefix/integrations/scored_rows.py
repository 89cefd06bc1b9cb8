"""Log-probabilities and entropies at some rows of a packed row, without logits of all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredRows:
    """What is asked of a model in place of its logits."""

    rows: np.ndarray
    """[n] int64: rows of the framework's packed row."""
    labels: Tensor
    """[n] int64: the token at each that is scored."""
    temperature: float
    with_entropy: bool
    train_entropy: bool
    chunk_tokens: int
    """Rows of logits that exist at once."""

    def refuse_rows_outside(self, num_tokens: int) -> None:
        """Of a packed row of `num_tokens`, with a ValueError."""
        outside = (self.rows < 0) | (self.rows >= num_tokens)
        if outside.any():
            raise ValueError(
                f"rows has {self.rows[outside][0]}, and the packed row {num_tokens} tokens: give "
                f"rows from 0 to {num_tokens - 1}"
            )


def log_probs_of_rows(
    model: nn.Module,
    *,
    rows: Tensor | np.ndarray | Sequence[int],
    labels: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
    train_entropy: bool = False,
    chunk_tokens: int = 1024,
    **batch: Any,
) -> Tensor:
    """Run a model on a packed row, and score tokens at some of its rows.

    In place of `model(**batch)` in a forward step. Logits exist for `chunk_tokens` rows at a time,
    in forward and in backward, and the last layer computes only the rows that are asked for.

    Args:
        model: that `share_prefixes` was called on, in Megatron's wrappers or not.
        rows: [n] rows of the framework's packed row.
        labels: [n] tokens to score, on the model's device. Row t of a sequence predicts its token
            t + 1.
        temperature: divides the logits.
        with_entropy: also give the entropy of each row's distribution.
        train_entropy: let gradients flow through the entropies too.
        chunk_tokens: rows of logits that exist at once.
        batch: what the framework gives to the model: `input_ids`, `packed_seq_params`, and so on,
            without `labels`.

    Returns:
        On the last pipeline stage [1, n, 1], or [1, n, 2] with entropies, in float32 or wider, the
        same on every tensor-parallel rank. Padding of the vocabulary takes part in the softmax, as
        it does in Megatron's own loss. On other stages the model's output.
    """
    if isinstance(rows, Tensor):
        rows = rows.detach().cpu().numpy()
    scored = ScoredRows(
        rows=np.asarray(rows, dtype=np.int64),
        labels=labels,
        temperature=temperature,
        with_entropy=with_entropy or train_entropy,
        train_entropy=train_entropy,
        chunk_tokens=chunk_tokens,
    )
    if labels.dtype != torch.int64 or labels.shape != scored.rows.shape or labels.dim() != 1:
        raise ValueError(
            f"labels is {labels.dtype} of shape {list(labels.shape)} for rows of shape "
            f"{list(scored.rows.shape)}: give one int64 token for each row"
        )
    batch.setdefault("position_ids", None)
    batch.setdefault("attention_mask", None)
    return model(**batch, scored_rows=scored)
