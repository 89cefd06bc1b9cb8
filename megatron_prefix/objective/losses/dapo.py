"""DAPO: Yu et al. 2025 (arXiv 2503.14476), eq. 8.

    token loss = -min(r A, clip(r) A)          r = pi(token) / pi_old(token)
    A          = (reward - mean) / std         of the group
    loss       = mean over all tokens of the optimizer step

The upper bound is wider than the lower one. The paper's two other parts are options: over-long
responses (`objective.overlong`, its eq. 13) and dynamic sampling
(`objective.zero_advantages: resample`).
"""

from __future__ import annotations

from megatron_prefix.objective.losses.form import Objective
from megatron_prefix.objective.losses.surrogate import clipped_by_surrogate, clipped_surrogate

DAPO = Objective(
    token_loss=clipped_surrogate,
    clipped=clipped_by_surrogate,
    advantage="std",
    clip_low=0.2,
    clip_high=0.28,
    aggregation="token_mean",
)
