"""Dr.GRPO: Liu et al. 2025, Understanding R1-Zero-Like Training (arXiv 2503.20783), fig. 1.

    token loss = -min(r A, clip(r) A)          r = pi(token) / pi_old(token)
    A          = reward - mean                 of the group
    loss       = sum over all tokens / (responses x max_response_length)

GRPO without two divisions that weigh short responses and easy prompts more: by the response's
length, and by the standard deviation.
"""

from __future__ import annotations

from megatron_prefix.objective.losses.form import Objective
from megatron_prefix.objective.losses.surrogate import clipped_by_surrogate, clipped_surrogate

DR_GRPO = Objective(
    token_loss=clipped_surrogate,
    clipped=clipped_by_surrogate,
    advantage="mean",
    clip_low=0.2,
    clip_high=0.2,
    aggregation="constant",
)
