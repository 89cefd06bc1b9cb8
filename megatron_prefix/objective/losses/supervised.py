"""The negative log-likelihood of the responses, for a warm start.

    token loss = -logprob
    loss       = mean over all tokens of the optimizer step

It looks neither at rewards nor at a ratio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.objective.losses.form import Clipped, Objective, Terms, none_of

if TYPE_CHECKING:
    from torch import Tensor


def _token_loss(terms: Terms) -> Tensor:
    return -terms.logprobs


def _clipped(terms: Terms) -> Clipped:
    nothing = none_of(terms.logprobs)
    return Clipped(low=nothing, high=nothing, dual=nothing)


SUPERVISED = Objective(
    token_loss=_token_loss,
    clipped=_clipped,
    takes_dual_clip=False,
    uses_advantages=False,
    uses_ratio=False,
    # Advantages and ratios take no part in it.
    advantage="mean",
    clip_low=0.2,
    clip_high=0.2,
    aggregation="token_mean",
)
