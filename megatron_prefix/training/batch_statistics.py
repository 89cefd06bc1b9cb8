"""What there is to learn from a rollout batch, and a warning where there is nothing for long."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.objective.losses import OBJECTIVES
from megatron_prefix.rollouts.records import UNKNOWN, RolloutSummary
from megatron_prefix.training.step_plan import StepPlan

logger = logging.getLogger(__name__)

_PATIENCE = 3
"""Rollout batches in a row that teach nothing before it is said."""
_ROUNDING = 1e-9
"""A sum of advantages is 0 if it is so small beside the largest."""


@dataclass(frozen=True, kw_only=True)
class BatchStatistics:
    """Shares of a rollout batch's groups and responses."""

    zero_advantage: float
    """Groups all of whose advantages are 0."""
    unfinished: float | None
    """Responses that were cut off at a limit of length, of those that say so; None: none does."""
    repeated: float
    """Responses with the tokens of an earlier response of their group."""
    overlong: float
    """Responses that `objective.overlong` masks or penalises."""
    skipped: float
    """Responses that are not computed."""
    largest_group: int
    """Responses of the largest group."""
    teaches: bool
    """Whether the policy loss of any group has a gradient. It has none where all responses of a
    group are the same and their advantages add up to 0."""

    @classmethod
    def of(
        cls, summary: RolloutSummary, steps: Sequence[StepPlan], objective: ObjectiveConfig
    ) -> BatchStatistics:
        """Of a batch and the plan of its optimizer steps."""
        advantages = np.concatenate([step.advantages for step in steps])
        trained = np.concatenate([step.filtered.trained for step in steps])
        starts = summary.group_offsets[:-1]
        groups = np.logical_or.reduceat(advantages != 0, starts)
        uses_advantages = OBJECTIVES[objective.name].uses_advantages
        known = summary.finished != UNKNOWN
        return cls(
            zero_advantage=float(np.mean(~groups)),
            unfinished=float(np.mean(summary.finished[known] == 0)) if known.any() else None,
            repeated=float(np.mean(summary.repeated)),
            overlong=float(np.mean(np.concatenate([step.filtered.overlong for step in steps]))),
            skipped=float(np.mean(~np.concatenate([step.filtered.computed for step in steps]))),
            largest_group=int(summary.group_sizes.max()),
            teaches=bool(
                _teaching(advantages * trained, summary).any() if uses_advantages else trained.any()
            ),
        )

    def metrics(self) -> dict[str, float]:
        """What to log."""
        found = {
            "zero_advantage_fraction": self.zero_advantage,
            "repeated_fraction": self.repeated,
            "overlong_fraction": self.overlong,
            "skipped_fraction": self.skipped,
        }
        return (
            found if self.unfinished is None else {**found, "unfinished_fraction": self.unfinished}
        )


def reward_spread(summary: RolloutSummary) -> dict[str, float]:
    """How far rewards differ over the batch, and within its groups."""
    rewards, sizes = summary.rewards, summary.group_sizes
    starts = summary.group_offsets[:-1]
    means = np.add.reduceat(rewards, starts) / sizes
    squares = np.add.reduceat((rewards - np.repeat(means, sizes)) ** 2, starts) / sizes
    return {
        "reward_min": float(rewards.min()),
        "reward_max": float(rewards.max()),
        "reward_std": float(rewards.std()),
        "reward_group_std": float(np.sqrt(squares).mean()),
    }


def _teaching(advantages: NDArray[np.float64], summary: RolloutSummary) -> NDArray[np.bool_]:
    """[groups] whether a group's policy loss has a gradient.

    Args:
        advantages: [responses], 0 for those that do not count.
        summary: of the batch.
    """
    starts = summary.group_offsets[:-1]
    largest = np.maximum.reduceat(np.abs(advantages), starts)
    repeats = np.add.reduceat(summary.repeated.astype(np.int64), starts)
    is_one = (repeats == summary.group_sizes - 1) & (summary.group_sizes > 1)
    # Where advantages are given for tokens, these are only the largest of each response.
    is_one &= summary.largest_advantages is None
    adds_up = np.abs(np.add.reduceat(advantages, starts)) > _ROUNDING * largest
    return (largest > 0) & (adds_up | ~is_one)


class TeachingWatch:
    """Says so when several rollout batches in a row teach nothing."""

    def __init__(self) -> None:
        """Nothing is seen yet."""
        self._in_vain = 0

    def see(self, statistics: BatchStatistics, *, step: int) -> None:
        """Take note of a step's batch, and warn at the third in a row."""
        self._in_vain = 0 if statistics.teaches else self._in_vain + 1
        if self._in_vain != _PATIENCE:
            return
        logger.warning(
            "steps %d to %d: no response has an advantage that trains the policy, while the "
            "optimizer's momentum still moves it; %s",
            *(step - _PATIENCE + 1, step, _likely_cause(statistics)),
        )


def _likely_cause(statistics: BatchStatistics) -> str:
    if statistics.largest_group == 1:
        return (
            "each group is a single response, which nothing is compared with: raise "
            "rollouts.group_size"
        )
    if statistics.repeated > 0.5:
        return (
            "most responses repeat another one of their group: raise the temperature, or let the "
            "server draw each response from a seed of its own"
        )
    if statistics.unfinished is not None and statistics.unfinished > 0.5:
        return (
            "most responses are cut off at the limit of length: raise "
            "rollouts.max_response_length, or take shorter prompts"
        )
    return (
        "all responses of a group have equal rewards: look at the reward function and at "
        "rollouts.group_size, and choose prompts that are solved sometimes"
    )
