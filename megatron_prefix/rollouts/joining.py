"""Fields of groups as flat arrays, one group behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.rollouts.summary import offsets_of
from megatron_prefix.rollouts.turns import at_turn_ends

if TYPE_CHECKING:  # which imports this file
    from megatron_prefix.rollouts.records import RolloutGroup, Tokens


def joined(parts: Sequence[Any], dtype: type) -> NDArray:
    """The parts one behind the other, in an array that cannot be written to."""
    arrays = [np.asarray(part, dtype=dtype) for part in parts]
    found = np.concatenate([np.zeros(0, dtype=dtype), *arrays])
    found.flags.writeable = False
    return found


def named_rewards_of(groups: Sequence[RolloutGroup]) -> dict[str, NDArray[np.float64]]:
    """[R] of each name; NaN for responses of groups that do not have it."""
    names = dict.fromkeys(name for group in groups for name in group.named_rewards)
    return {
        name: joined(
            [g.named_rewards.get(name, np.full(len(g.responses), np.nan)) for g in groups],
            np.float64,
        )
        for name in names
    }


def position_shifts_of(groups: Sequence[RolloutGroup]) -> dict[str, NDArray[np.int32]]:
    """Those of prompts and of responses by their names, 0 for groups without; none: no group has
    any."""
    if all(g.prompt_position_shifts is None and g.position_shifts is None for g in groups):
        return {}
    prompts, responses = [], []
    for group in groups:
        of_prompt, of_responses = group.prompt_position_shifts, group.position_shifts
        prompts.append(_zeros(group.prompt) if of_prompt is None else of_prompt)
        responses += map(_zeros, group.responses) if of_responses is None else of_responses
    return {
        "prompt_position_shifts": np.concatenate(prompts).astype(np.int32, copy=False),
        "position_shifts": np.concatenate(responses).astype(np.int32, copy=False),
    }


def _zeros(tokens: Tokens) -> NDArray[np.int32]:
    return np.zeros((len(tokens), 3), dtype=np.int32)


def routes_of(groups: Sequence[RolloutGroup]) -> NDArray | None:
    """[S, layers, topk]; all groups have them, or none has."""
    if all(group.routes is None for group in groups):
        return None
    found = np.concatenate([values for group in groups for values in group.routes or ()])
    found.flags.writeable = False
    return found


def of_tokens(
    groups: Sequence[RolloutGroup], name: str, dtype: type, *, absent: float
) -> NDArray | None:
    """[T] a field of the tokens of responses, `absent` for groups without it; None: all are"""
    if all(getattr(group, name) is None for group in groups):
        return None
    return joined(
        [
            np.full(len(response), absent) if values is None else values[r]
            for group in groups
            for values in [getattr(group, name)]
            for r, response in enumerate(group.responses)
        ],
        dtype,
    )


def turn_rewards_of(group: RolloutGroup) -> NDArray[np.float64]:
    """[tokens of the group]"""
    offsets = offsets_of([len(response) for response in group.responses])
    if group.turn_rewards is None:
        return np.full(int(offsets[-1]), np.nan)
    mask = None if group.loss_mask is None else joined(group.loss_mask, np.bool_)
    return at_turn_ends(joined(group.turn_rewards, np.float64), mask, offsets)
