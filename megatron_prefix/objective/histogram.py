"""Counts of log-ratios in fixed bins, which add up over microbatches and ranks.

The bins are even in the logarithm of the log-ratio's size: each is 5 % wider than the one before,
so a quantile is known to 2.5 % of its log-ratio. Ratios from exp(-1e-6) to exp(1e-6) count as 1.

Legend: B bins.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_prefix.objective.ratio import LARGEST_LOG_RATIO

_SMALLEST = 1e-6
_GROWTH = math.log(1.05)
_PER_SIGN = math.ceil(math.log(LARGEST_LOG_RATIO / _SMALLEST) / _GROWTH)

BINS = 2 * _PER_SIGN + 1
"""Bins of a histogram: of log-ratios below 0, of those near 0, of those above 0."""


def log_ratio_counts(log_ratio: Tensor, counted: Tensor) -> Tensor:
    """How many log-ratios are in each bin.

    Args:
        log_ratio: [E]; sizes beyond `LARGEST_LOG_RATIO` count in the outermost bins. A NaN, which
            lost weights make and the gradient's norm tells of, counts as 0.
        counted: [E] bool.

    Returns:
        [B] float64
    """
    values = log_ratio.detach().double().nan_to_num(nan=0.0)
    size = values.abs().clamp(min=_SMALLEST, max=LARGEST_LOG_RATIO)
    steps = ((size / _SMALLEST).log() / _GROWTH).ceil().clamp(max=_PER_SIGN)
    bins = (steps * values.sign()).long() + _PER_SIGN
    counts = torch.zeros(BINS, dtype=torch.float64, device=log_ratio.device)
    return counts.index_put((bins,), counted.double(), accumulate=True)


def ratio_at(counts: Tensor, fraction: float) -> float:
    """The ratio that a fraction of what was counted does not exceed; 1 where nothing was.

    The last of them (fraction 1) is the largest ratio.

    Args:
        counts: [B].
        fraction: from 0 to 1.
    """
    total = counts.cumsum(0)
    if total[-1] == 0:
        return 1.0
    wanted = max(1.0, math.ceil(fraction * float(total[-1])))
    step = int(torch.searchsorted(total, wanted)) - _PER_SIGN
    if step == 0:
        return 1.0
    # The middle of the bin, in the logarithm of the log-ratio.
    size = _SMALLEST * math.exp(_GROWTH * (abs(step) - 0.5))
    return math.exp(math.copysign(min(size, LARGEST_LOG_RATIO), step))
