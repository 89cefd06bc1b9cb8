"""Responses of a group that are not trained on, and rewards that their length lowers.

All depends on lengths and rewards alone, in float64, so every rank comes to the same.

Legend: G responses of one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.objective.advantages import LARGEST_REWARD, group_advantages
from megatron_prefix.objective.config import ObjectiveConfig
from megatron_prefix.objective.losses import OBJECTIVES
from megatron_prefix.objective.options import OverlongConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupTerms:
    """What the objective makes of a group's responses, [G] each."""

    advantages: NDArray[np.float64]
    trained: NDArray[np.bool_]
    """Whether a response counts: false for those that `overlong` masks, as if they were not there
    but for their reward."""
    computed: NDArray[np.bool_]
    """Whether a response has to run: it counts, and its gradient may differ from 0."""
    overlong: NDArray[np.bool_]
    """Whether `overlong` masks or penalises a response."""


def group_terms(
    rewards: NDArray[np.float64],
    lengths: NDArray,
    finished: NDArray[np.int8],
    config: ObjectiveConfig,
    *,
    given: NDArray[np.float64] | None = None,
) -> GroupTerms:
    """Apply penalties, advantages and filters to a group, in this order.

    Args:
        rewards: [G].
        lengths: [G] tokens of each response.
        finished: [G] 1: it ended by itself; 0: at a limit of length; -1: not known.
        config: resolved.
        given: [G] of advantages that are given for the tokens of a response, the one farthest from
            0; NaN where its advantage comes from its reward. None: all do.

    Raises:
        ValueError: bad rewards or advantages, a penalty on rewards that no advantage comes from, or
            a response of which `overlong` has to know whether it is finished, naming it.
    """
    overlong = np.zeros(len(rewards), dtype=np.bool_)
    trained = ~overlong
    if config.overlong is not None and config.overlong.kind == "penalty":
        penalties = overlong_penalties(lengths, config.overlong)
        rewards, overlong = rewards - penalties, penalties > 0
    elif config.overlong is not None:
        overlong = cut_off(lengths, finished, config.overlong)
        trained = ~overlong
    advantages = group_advantages(rewards, config.advantage, eps=config.advantage_epsilon)
    if given is not None:
        _check_given(given, config)
        advantages = np.where(np.isnan(given), advantages, given)
    computed = trained
    if config.zero_advantages == "skip" and OBJECTIVES[config.name].uses_advantages:
        computed = trained & (advantages != 0)
    return GroupTerms(advantages=advantages, trained=trained, computed=computed, overlong=overlong)


def _check_given(given: NDArray[np.float64], config: ObjectiveConfig) -> None:
    for index in np.flatnonzero(np.abs(given) > LARGEST_REWARD):
        raise ValueError(
            f"an advantage of response {index} is {given[index]}: advantages must be finite "
            f"numbers from {-LARGEST_REWARD:g} to {LARGEST_REWARD:g}"
        )
    lowers_rewards = {
        "objective.overlong.kind: penalty": config.overlong is not None
        and config.overlong.kind == "penalty",
        "objective.kl_in: reward": config.kl_in == "reward",
    }
    for option in (name for name, is_set in lowers_rewards.items() if is_set):
        for index in np.flatnonzero(~np.isnan(given)):
            raise ValueError(
                f"response {index} has advantages or turn_rewards of its own, and {option} lowers "
                "its reward, which they do not come from; leave out one of the two"
            )


def overlong_penalties(lengths: NDArray, config: OverlongConfig) -> NDArray[np.float64]:
    """[G] what each response's reward loses: DAPO's soft penalty (arXiv 2503.14476, eq. 13).

    0 up to length - buffer tokens, then growing evenly to `factor` at `length` tokens and beyond.
    """
    assert config.length is not None and config.buffer is not None
    over = (np.asarray(lengths, dtype=np.float64) - (config.length - config.buffer)) / config.buffer
    return config.factor * over.clip(0.0, 1.0)


def cut_off(
    lengths: NDArray, finished: NDArray[np.int8], config: OverlongConfig
) -> NDArray[np.bool_]:
    """[G] which responses were cut off at a limit of length.

    Raises:
        ValueError: a response does not say so, and there is no `length` to judge by, naming it.
    """
    unknown = finished < 0
    if config.length is None:
        for index in np.flatnonzero(unknown):
            raise ValueError(
                f"finished: not known of response {index}, and objective.overlong masks responses "
                "that are not finished; give it, or set objective.overlong.length to the tokens of "
                "the longest response that can be sampled"
            )
        return finished == 0
    return np.where(unknown, np.asarray(lengths) >= config.length, finished == 0)
