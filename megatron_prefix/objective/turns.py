"""Advantages of turns: each turn's reward against those of all turns to the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.objective.advantages import group_advantages
from megatron_prefix.objective.choices import AdvantageKind, TurnAdvantage


def turn_advantages(
    rewards: Sequence[NDArray[np.float64]],
    kind: AdvantageKind,
    *,
    of: TurnAdvantage,
    eps: float = 1e-6,
) -> list[NDArray[np.float64]]:
    """Advantages of the trained turns of G responses to one prompt.

    The rewards of all turns of the group are normalised together, as `group_advantages` does it
    with the rewards of responses. A turn's advantage is then

        return   the sum over this turn and those after it in its response: process supervision
                 in DeepSeekMath (arXiv 2402.03300, section 4.1.3)
        reward   this turn's alone

    With one turn in each response both are `group_advantages` of the responses' rewards.

    Args:
        rewards: for each response, of each of its turns.
        kind, eps: see `group_advantages`.
        of: 'return' or 'reward'.

    Returns:
        For each response, of each of its turns, float64.

    Raises:
        ValueError: see `group_advantages`; or an unknown `of`.
    """
    if of not in get_args(TurnAdvantage):
        raise ValueError(
            f"turn_advantage={of!r}: choose one of {', '.join(get_args(TurnAdvantage))}"
        )
    normalised = group_advantages(np.concatenate(rewards), kind, eps=eps)
    ends = np.cumsum([len(values) for values in rewards])[:-1]
    found = np.split(normalised, ends)
    if of == "reward":
        return found
    return [np.cumsum(values[::-1])[::-1] for values in found]
