"""Every normalisation of the loss, as one weight per token over the global batch.

The global batch is all sequences of one optimizer step: over all microbatches and all ranks. With
these weights the loss is `sum over tokens of weight * token_loss`, a plain sum, so microbatches,
data-parallel ranks, packing order and splitting a group cannot change it. Nothing may be averaged
after that: not over microbatches, not over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np

from megatron_prefix.objective.choices import Aggregation


def token_weights(
    response_lengths: Sequence[int] | np.ndarray,
    aggregation: Aggregation,
    *,
    max_response_length: int | None = None,
) -> np.ndarray:
    """The weight of each trained token of each sequence in the global batch.

    With N sequences of L_i trained tokens:

        sequence_mean  1 / (N * L_i)                   mean over sequences of their token means
        token_mean     1 / sum(L)                      mean over all tokens
        constant       1 / (N * max_response_length)   mean over sequences of their token sums,
                                                       over a constant

    Where groups differ in size, `sequence_mean` counts sequences alike, not groups. `token_mean`
    divides by the tokens of the whole batch; the formula in the DAPO paper divides by those of a
    group and averages the groups.

    Args:
        response_lengths: [N] trained tokens of every sequence of the global batch.
        aggregation: 'sequence_mean', 'token_mean' or 'constant'.
        max_response_length: in tokens; needed by 'constant', unused by the others.

    Returns:
        [N] float64: the weight of every token of that sequence. Empty for an empty batch.

    Raises:
        ValueError: a sequence without tokens or, with 'constant', one longer than
            `max_response_length` (the message names the sequence); 'constant' without
            `max_response_length`; an unknown aggregation.
    """
    lengths = np.asarray(response_lengths, dtype=np.int64)
    if lengths.ndim != 1:
        raise ValueError(
            f"response_lengths have shape {list(lengths.shape)}: give one length per sequence"
        )
    for index in np.flatnonzero(lengths < 1):
        raise ValueError(
            f"response {index} has {lengths[index]} tokens: a response needs at least one"
        )

    if aggregation == "sequence_mean":
        return 1.0 / (lengths.size * lengths)
    if aggregation == "token_mean":
        return np.full(lengths.size, 1.0) / lengths.sum()
    if aggregation == "constant":
        return _constant_weights(lengths, max_response_length)
    raise ValueError(
        f"aggregation={aggregation!r}: choose one of {', '.join(get_args(Aggregation))}"
    )


def _constant_weights(lengths: np.ndarray, max_response_length: int | None) -> np.ndarray:
    if max_response_length is None or max_response_length < 1:
        raise ValueError(
            f"max_response_length={max_response_length!r}: aggregation 'constant' divides by it, "
            "set it to the longest response, in tokens, that can be sampled"
        )
    for index in np.flatnonzero(lengths > max_response_length):
        raise ValueError(
            f"response {index} has {lengths[index]} tokens, more than "
            f"max_response_length={max_response_length}: raise max_response_length"
        )
    return np.full(lengths.size, 1.0) / (lengths.size * max_response_length)
