"""PPO's clipped surrogate, which several objectives share.

Schulman et al. 2017, Proximal Policy Optimization (arXiv 1707.06347), eq. 7:

    token loss = -min(r A, clip(r) A)

For A < 0 it grows with r without a limit. The dual clip of Ye et al. 2020, Mastering Complex
Control in MOBA Games (arXiv 1912.09729), eq. 5, bounds it:

    token loss = -max(min(r A, clip(r) A), c A)   where A < 0
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.objective.losses.form import Clipped, Terms, none_of

if TYPE_CHECKING:
    from torch import Tensor


def clipped_surrogate(terms: Terms) -> Tensor:
    """[E] the loss of each entry."""
    advantages = terms.advantages
    loss = -(terms.ratio * advantages).minimum(terms.clipped_ratio * advantages)
    if terms.dual_clip is None:
        return loss
    return loss.minimum(-terms.dual_clip * advantages).where(advantages < 0, loss)


def clipped_by_surrogate(terms: Terms) -> Clipped:
    """Entries whose ratio the advantage would push further out of the clip range."""
    ratio, advantages = terms.ratio.detach(), terms.advantages
    negative = advantages < 0
    beyond = none_of(ratio) if terms.dual_clip is None else ratio > terms.dual_clip
    return Clipped(
        low=(ratio < terms.clipped_ratio) & negative,
        high=(ratio > terms.clipped_ratio) & (advantages > 0),
        dual=beyond & negative,
    )
