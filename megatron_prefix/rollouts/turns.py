"""The trained turns of responses: runs of tokens that are trained on, one behind the other.

Legend: T tokens of all responses, R responses, K trained turns of all responses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def turn_ends(
    loss_mask: NDArray[np.bool_] | None, response_offsets: NDArray[np.integer]
) -> NDArray[np.int64]:
    """[K] where the last token of each trained turn is, in the arrays of T.

    Args:
        loss_mask: [T] whether a token is trained on; None: all are, so each response is one turn.
        response_offsets: [R + 1].
    """
    lasts = response_offsets[1:] - 1
    if loss_mask is None:
        return lasts.astype(np.int64)
    goes_on = np.append(loss_mask[1:], False)
    goes_on[lasts] = False
    return np.flatnonzero(loss_mask & ~goes_on)


def num_turns(loss_mask: Sequence[bool] | NDArray | None) -> int:
    """Trained turns of one response."""
    if loss_mask is None:
        return 1
    mask = np.asarray(loss_mask, dtype=np.bool_)
    return len(turn_ends(mask, np.array([0, len(mask)])))


def at_turn_ends(
    values: NDArray[np.float64],
    loss_mask: NDArray[np.bool_] | None,
    response_offsets: NDArray[np.integer],
) -> NDArray[np.float64]:
    """[T] each trained turn's value at the turn's last token, NaN at all other tokens.

    Args:
        values: [K].
        loss_mask, response_offsets: see `turn_ends`.
    """
    found = np.full(int(response_offsets[-1]), np.nan)
    found[turn_ends(loss_mask, response_offsets)] = values
    return found
