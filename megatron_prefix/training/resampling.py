"""Rollout batches without groups that teach nothing: DAPO's dynamic sampling (arXiv 2503.14476,
section 3.2).

Groups without any advantage are taken out of a batch, and further batches are sampled to fill it up
again, up to a limit. What is left over of a further batch is dropped, so the engine's own state is
all there is to resume from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.distributed.rank_results import on_rank_0, rank_0_alone
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup
from megatron_prefix.training.step_plan import terms_of_groups


class Resampling:
    """Makes batches of groups that teach something."""

    def __init__(self, objective: ObjectiveConfig, *, num_groups: int, at_least: int) -> None:
        """Nothing is sampled yet.

        Args:
            objective: says what teaches something, and how many further batches there may be.
            num_groups: of a full batch.
            at_least: groups that a batch has to have, whether they teach anything or not.
        """
        self._objective = objective.resolved()
        self._num_groups, self._at_least = num_groups, at_least
        self._metrics: dict[str, float] = {}

    def fill(
        self, batch: RolloutBatch | None, sample: Callable[[], RolloutBatch | None]
    ) -> RolloutBatch | None:
        """A batch, filled up with groups of further batches. Collective.

        Args:
            batch: that was sampled, on rank 0; None there where there are no more.
            sample: gives a further batch, likewise. Collective.

        Returns:
            On rank 0 at most `num_groups` groups, each of which teaches something unless there are
            fewer than `at_least` such; None where there was no batch.

        Raises:
            ValueError: bad rewards, or log-probabilities in some of the batches only.
        """
        found = _Groups()
        for further in range(self._objective.resample_limit + 1):
            if further:
                batch = sample()
            if on_rank_0(functools.partial(self._is_done, batch, found)):
                break
        self._metrics = on_rank_0(found.metrics)
        return rank_0_alone(lambda: self._chosen(found))

    def metrics(self) -> dict[str, float]:
        """Of the last batch, the same on every rank."""
        return self._metrics

    def _is_done(self, batch: RolloutBatch | None, found: _Groups) -> bool:
        """Sort a batch into what was found; whether no further one is needed, or there is none."""
        if batch is None:
            return True
        found.rewards.append(batch.rewards)
        terms = terms_of_groups(batch.summary(), self._objective)
        for group, of_group in zip(batch.groups(), terms, strict=True):
            teaches = (of_group.trained & (of_group.advantages != 0)).any()
            (found.teaching if teaches else found.others).append(group)
        return len(found.teaching) >= self._num_groups

    def _chosen(self, found: _Groups) -> RolloutBatch | None:
        if not found.rewards:
            return None
        missing = max(self._at_least - len(found.teaching), 0)
        groups = [*found.teaching, *found.others[:missing]]
        return RolloutBatch.from_groups(groups[: self._num_groups])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Groups:
    """What was sampled for one step, on rank 0."""

    teaching: list[RolloutGroup] = field(default_factory=list)
    others: list[RolloutGroup] = field(default_factory=list)
    rewards: list[NDArray[np.float64]] = field(default_factory=list)
    """Of each batch."""

    def metrics(self) -> dict[str, float]:
        if not self.rewards:
            return {}
        return {
            "sampled_groups": float(len(self.teaching) + len(self.others)),
            "sampled_reward": float(np.concatenate(self.rewards).mean()),
        }
