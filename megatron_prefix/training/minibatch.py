"""The microbatches of one optimizer step that this rank runs."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.layout import Packing, rows_of
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup
from megatron_prefix.training.batch import HostBatch, PackedBatch, to_device
from megatron_prefix.training.prefetch import Prefetched
from megatron_prefix.training.row_planning import PlannedMicrobatch, RowPlanner
from megatron_prefix.training.series import BatchSeries, series_to_device
from megatron_prefix.training.shares import Share, take_share
from megatron_prefix.training.step_plan import StepPlan, plan_rollouts


class Minibatch:
    """One optimizer step's microbatches of a data-parallel rank."""

    def __init__(
        self,
        step: StepPlan,
        share: Share,
        packing: Packing,
        *,
        attention: AttentionSetup,
        data_parallel_rank: int,
    ) -> None:
        """Start to plan the microbatches.

        Args:
            step: the same on every rank.
            share: holds the responses that the plan gives to this rank.
            packing: that the step was planned by.
            attention: of the model.
            data_parallel_rank: of this rank.
        """
        self.step = step
        self._slices = step.microbatches.microbatches[data_parallel_rank]
        planner = RowPlanner(step=step, share=share, packing=packing, attention=attention)
        self._batches = Prefetched(
            [functools.partial(planner.plan, slices) for slices in self._slices],
            functools.partial(_to_device, attention=attention),
        )

    @property
    def batches(self) -> Sequence[PackedBatch | BatchSeries]:
        """The microbatches, planned and sent to the device ahead of their turn."""
        return self._batches

    @property
    def rows(self) -> list[PackedBatch]:
        """All rows that something is trained on, microbatch by microbatch."""
        return [row for batch in self._batches for row in batch.rows]

    @property
    def responses_of_rows(self) -> list[NDArray[np.int64]]:
        """For each of the `rows` the response of each of its sequences, an index into the batch."""
        return [
            np.array(
                [self.step.responses_of_unit[p.group][i] for p in row for i in p.sequences],
                dtype=np.int64,
            )
            for slices in self._slices
            for row in rows_of(slices)
        ]

    @property
    def packed_tokens(self) -> int:
        """Tokens of the packed rows that this rank has a part of, padding included."""
        return sum(planned.tokens for planned in self._batches.planned())

    @property
    def flops(self) -> int:
        """Predicted forward FLOPs of these rows."""
        return sum(planned.flops for planned in self._batches.planned())

    @property
    def prediction_flops(self) -> int:
        """Of these, those of multi-token prediction."""
        return sum(planned.prediction_flops for planned in self._batches.planned())

    def distribution(self) -> str:
        """How this rank thinks its rows are distributed over context-parallel ranks."""
        batches = (planned.batch for planned in self._batches.planned())
        return "; ".join(
            f"microbatch {index}: {batch.row.shards.summary()}"
            for index, batch in enumerate(batches)
            if isinstance(batch, HostBatch) and batch.row.shards is not None
        )


def _to_device(
    planned: PlannedMicrobatch, *, attention: AttentionSetup
) -> PackedBatch | BatchSeries:
    if isinstance(planned.batch, HostBatch):
        return to_device(planned.batch, attention)
    return series_to_device(planned.batch, attention)


def build_minibatch(
    rollouts: RolloutBatch | Iterable[RolloutGroup],
    objective: ObjectiveConfig,
    packing: Packing,
    *,
    attention: AttentionSetup,
    data_parallel_rank: int,
) -> Minibatch:
    """One optimizer step over rollouts that this process holds all of.

    Not collective: context-parallel ranks compare `Minibatch.distribution` before they run it.

    Raises:
        ValueError: a group or response that exceeds the token budget, or bad rewards, naming it.
    """
    batch = rollouts if isinstance(rollouts, RolloutBatch) else RolloutBatch.from_groups(rollouts)
    plan = plan_rollouts(batch.summary(), objective, packing)
    return Minibatch(
        plan.steps[0],
        take_share(batch, plan.shares[data_parallel_rank]),
        packing,
        attention=attention,
        data_parallel_rank=data_parallel_rank,
    )
