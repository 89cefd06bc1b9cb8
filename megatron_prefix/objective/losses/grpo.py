"""GRPO: Shao et al. 2024, DeepSeekMath (arXiv 2402.03300), eq. 3.

    token loss = -min(r A, clip(r) A)          r = pi(token) / pi_old(token)
    A          = (reward - mean) / std         of the group
    loss       = mean over each response's tokens, then over responses

The paper names its clip range without a number: 0.2 is PPO's.
"""

from __future__ import annotations

from megatron_prefix.objective.losses.form import Objective
from megatron_prefix.objective.losses.surrogate import clipped_by_surrogate, clipped_surrogate

GRPO = Objective(
    token_loss=clipped_surrogate,
    clipped=clipped_by_surrogate,
    advantage="std",
    clip_low=0.2,
    clip_high=0.2,
    aggregation="sequence_mean",
)
