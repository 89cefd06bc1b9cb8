"""CISPO: MiniMax 2025, MiniMax-M1 (arXiv 2506.13585), eq. 4 and 5.

    token loss = -stop_gradient(clip(r)) A logprob      r = pi(token) / pi_old(token)
    A          = (reward - mean) / std                  of the group
    loss       = mean over all tokens of the optimizer step

The ratio is clipped as a weight, so no token loses its gradient. The paper has no lower bound
(clip_low 1 is none) and gives no upper one; a cap of 5 (clip_high 4) is our choice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.objective.losses.form import Clipped, Objective, Terms, none_of

if TYPE_CHECKING:
    from torch import Tensor


def _token_loss(terms: Terms) -> Tensor:
    return -(terms.clipped_ratio.detach() * terms.advantages * terms.logprobs)


def _clipped(terms: Terms) -> Clipped:
    """Entries whose weight is clipped, whatever their advantage."""
    ratio = terms.ratio.detach()
    return Clipped(
        low=ratio < terms.clipped_ratio, high=ratio > terms.clipped_ratio, dual=none_of(ratio)
    )


CISPO = Objective(
    token_loss=_token_loss,
    clipped=_clipped,
    takes_dual_clip=False,
    advantage="std",
    clip_low=1.0,
    clip_high=4.0,
    aggregation="token_mean",
)
