"""What an objective is: the loss of a token, and the defaults that go with it.

Nothing here or in an objective's file needs torch before a loss is computed, so that a run's
configuration can read the defaults.

Legend: E entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_prefix.objective.choices import AdvantageKind, Aggregation

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Terms:
    """What token losses are made of."""

    logprobs: Tensor
    """[E] under the policy that is trained; carries the gradient."""
    ratio: Tensor
    """[E] r: the bounded ratio to the old policy, of the token or of its sequence; carries the
    gradient."""
    clipped_ratio: Tensor
    """[E] r held between 1 - clip_low and 1 + clip_high."""
    advantages: Tensor
    """[E] A"""
    dual_clip: float | None
    """c, where the loss of negative advantages is bounded."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Clipped:
    """[E] bool each: which entries clipping has changed."""

    low: Tensor
    """From below."""
    high: Tensor
    """From above."""
    dual: Tensor
    """By the dual clip."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One objective."""

    token_loss: Callable[[Terms], Tensor]
    """[E] the loss of each entry, which its weight multiplies."""
    clipped: Callable[[Terms], Clipped]
    """Which entries clipping has changed."""
    ratio_of: Literal["token", "sequence"] = "token"
    """Whether the ratio is a token's, or the geometric mean over its sequence."""
    takes_dual_clip: bool = True
    uses_advantages: bool = True
    """Whether rewards take part: an advantage of 0 then has no gradient."""
    uses_ratio: bool = True
    """Whether the old policy takes part: a token of unknown probability under it has no loss then.
    Otherwise the ratio is only reported."""
    advantage: AdvantageKind
    """Default, as the next three."""
    clip_low: float
    clip_high: float
    aggregation: Aggregation


def none_of(values: Tensor) -> Tensor:
    """[E] bool, all false."""
    return values.new_zeros(values.shape).bool()
