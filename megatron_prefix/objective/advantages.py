"""Advantages of a group's responses: each reward against the others to the same prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import numpy as np

from megatron_prefix.objective.choices import AdvantageKind

LARGEST_REWARD = 1e20
"""Its square and sums of it are numbers of 64 bits, its advantage is one of 32 bits."""


def group_advantages(
    rewards: Sequence[float] | np.ndarray, kind: AdvantageKind, *, eps: float = 1e-6
) -> np.ndarray:
    """Advantages of the G responses to one prompt.

        std            (r_i - mean(r)) / (std(r) + eps)        GRPO, eq. 3 and section 4.1.2
        mean           r_i - mean(r)                           Dr.GRPO
        leave_one_out  r_i - mean of the other G - 1 rewards   RLOO (arXiv 2402.14740)

    The standard deviation is the sample's (divisor G - 1). The GRPO paper does not say which it
    means; common trainers take this one. When all rewards are equal, which includes a group of one
    response, every advantage is exactly 0 for every kind: nothing in the group is better than
    anything else, and nothing is divided by a rounding error.

    Args:
        rewards: [G] rewards of one group, in the order of its responses.
        kind: 'std', 'mean' or 'leave_one_out'.
        eps: added to the standard deviation, in units of reward.

    Returns:
        [G] float64.

    Raises:
        ValueError: no rewards, more than one dimension, a reward that is no finite number or
            beyond 1e20 (the message names the response), an unknown kind, a negative eps.
    """
    if kind not in get_args(AdvantageKind):
        raise ValueError(f"advantage={kind!r}: choose one of {', '.join(get_args(AdvantageKind))}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"advantage_epsilon={eps!r}: set a number of at least 0")
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(
            f"rewards have shape {list(values.shape)}: give one reward per response of one group, "
            "at least one"
        )
    for index in np.flatnonzero(~(np.abs(values) <= LARGEST_REWARD)):
        raise ValueError(
            f"the reward of response {index} is {values[index]}: rewards must be finite numbers "
            f"from {-LARGEST_REWARD:g} to {LARGEST_REWARD:g}"
        )

    if values.min() == values.max():
        return np.zeros_like(values)
    centred = values - values.mean()
    if kind == "std":
        return centred / (values.std(ddof=1) + eps)
    if kind == "leave_one_out":
        # r_i - (sum(r) - r_i) / (G - 1), without subtracting two large sums
        return centred * (values.size / (values.size - 1))
    return centred
