"""GSPO: Zheng et al. 2025, Group Sequence Policy Optimization (arXiv 2507.18071), eq. 5.

    token loss = -min(s A, clip(s) A)          s = geometric mean of r over the response
    A          = (reward - mean) / std         of the group
    loss       = mean over each response's tokens, then over responses

All tokens of a response have one ratio, so the clip range (section 5.1 of the paper) is far
narrower than a token's.
"""

from __future__ import annotations

from megatron_prefix.objective.losses.form import Objective
from megatron_prefix.objective.losses.surrogate import clipped_by_surrogate, clipped_surrogate

GSPO = Objective(
    token_loss=clipped_surrogate,
    clipped=clipped_by_surrogate,
    ratio_of="sequence",
    advantage="std",
    clip_low=3e-4,
    clip_high=4e-4,
    aggregation="sequence_mean",
)
