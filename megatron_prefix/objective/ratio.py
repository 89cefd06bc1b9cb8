"""The one ratio of probabilities that all objectives and corrections use: bounded, never NaN.

Legend: E entries; all log-probabilities in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_LOG_RATIO = 10.0
"""Ratios are at most exp(10), or the largest bound that an option asks for where that is more."""

IMPOSSIBLE_LOGPROB = -1000.0
"""Values from here down are a server's way to write "unknown" or minus infinity (-9999)."""

_LOGPROB_ROUNDING = 0.125
"""Log-probabilities of bfloat16 logits can come out a little above 0."""


def bounded_ratio(log_ratio: Tensor, bound: float) -> Tensor:
    """exp(log_ratio), constant and without gradient beyond a bound.

    A token that the other policy held for nearly impossible has a ratio that overflows: 0 times
    infinity in the branch that clipping does not take would make every gradient NaN.

    Args:
        log_ratio: of any shape; not NaN.
        bound: of the log-ratio, at least `LARGEST_LOG_RATIO`; what an option compares the ratio
            with has to be below it.
    """
    assert bound >= LARGEST_LOG_RATIO
    return log_ratio.clamp(max=bound).exp()


def is_known(logprobs: Tensor) -> Tensor:
    """[E] bool: false where a value can be no log-probability of a token that was sampled.

    That is at most `IMPOSSIBLE_LOGPROB`, above 0 by more than rounding, or not a number.
    """
    return (logprobs > IMPOSSIBLE_LOGPROB) & (logprobs <= _LOGPROB_ROUNDING)


def known_or(logprobs: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """[E] each: the log-probabilities, with `other`'s where they are not known, and `is_known`."""
    known = is_known(logprobs)
    return torch.where(known, logprobs, other), known
