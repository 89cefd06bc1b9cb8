"""Which responses run together in the candidate, which losses of routers depend on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from equivalence.case import Case
from megatron_prefix.config.packing import packing_of_run
from megatron_prefix.layout import GroupSlice
from megatron_prefix.model.build import model_shape
from megatron_prefix.model.transformer_config import transformer_config
from megatron_prefix.rollouts.records import RolloutBatch
from megatron_prefix.training.step_plan import StepPlan, plan_rollouts

Name = tuple[int, int]
"""A response: its group, and its index in it."""


def planned_microbatches(case: Case) -> list[list[list[Name]]]:
    """[microbatch][data-parallel rank] the responses that run together, as the candidate plans."""
    config = transformer_config(case.model, case.parallel, case.training)
    packing = packing_of_run(
        case.training,
        case.parallel,
        model_shape=model_shape(case.model, config),
        data_parallel_size=case.data_parallel_size,
    )
    summary = RolloutBatch.from_groups(case.groups).summary()
    (step,) = plan_rollouts(summary, case.objective, packing).steps
    return [
        [names_of(case, step, slices) for slices in of_ranks]
        for of_ranks in zip(*step.microbatches.microbatches, strict=True)
    ]


def names_of(case: Case, step: StepPlan, parts: Sequence[GroupSlice]) -> list[Name]:
    """The responses that some slices' sequences end in."""
    first = np.cumsum([0, *(len(group.responses) for group in case.groups)])
    return [
        (group, step.responses_of_unit[part.group][i] - int(first[group]))
        for part in parts
        for group in [step.group_of_unit[part.group]]
        for i in part.sequences
    ]
