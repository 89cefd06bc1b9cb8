"""What runs where in the optimizer steps of a rollout batch, from lengths and rewards alone.

Every rank makes the same plan of the whole batch and needs no token for it. All normalisation
(advantages within a group, weights over an optimizer step's sequences) and all filters of responses
happen here, before anything is split. A response that is not computed is in no unit.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.layout import (
    MicrobatchPlan,
    Packing,
    TreeShape,
    trained_labels,
    trained_labels_of_lengths,
)
from megatron_prefix.layout.tree_cost import ungrouped_flops
from megatron_prefix.objective import ObjectiveConfig, group_terms, token_weights
from megatron_prefix.objective.filters import GroupTerms
from megatron_prefix.rollouts.summary import RolloutSummary
from megatron_prefix.training.shares import ShareSizes


@dataclass(frozen=True, kw_only=True, eq=False)
class FilteredResponses:
    """Which of R responses count, and which run: see `objective.filters`."""

    trained: NDArray[np.bool_]
    """[R]"""
    computed: NDArray[np.bool_]
    """[R]"""
    overlong: NDArray[np.bool_]
    """[R]"""


@dataclass(frozen=True, kw_only=True, eq=False)
class StepPlan:
    """One optimizer step over consecutive groups of a rollout batch."""

    units: Sequence[TreeShape]
    """What is planned as one: a group, or each of its sequences where nothing is shared."""
    group_of_unit: Sequence[int]
    """Index into the batch."""
    responses_of_unit: Sequence[Sequence[int]]
    """For each sequence of a unit the response that it ends in, an index into the batch."""
    prompt_lengths: NDArray[np.int32]
    """[groups of the batch]"""
    microbatches: MicrobatchPlan
    """Of the units, on all data-parallel ranks."""
    first_response: int
    """The step's first response, an index into the batch."""
    weights: NDArray[np.float64]
    """[responses of the step] of each of a response's trained tokens, over the step; 0 where it
    does not count."""
    advantages: NDArray[np.float64]
    """[responses of the step] of each of its tokens; where they are given for tokens, the one
    farthest from 0."""
    filtered: FilteredResponses
    """Of the step."""
    trained_tokens: int
    """Of all its responses that count."""
    ungrouped_tokens: int
    """Tokens that a run without sharing would compute, of the same responses."""
    ungrouped_flops: float
    """Its forward FLOPs."""

    def responses_of_rank(self, rank: int) -> NDArray[np.int64]:
        """The responses that a data-parallel rank runs, as indices into the batch."""
        found = [
            self.responses_of_unit[part.group][i]
            for slices in self.microbatches.microbatches[rank]
            for part in slices
            for i in part.sequences
        ]
        return np.array(found, dtype=np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class RolloutPlan:
    """All optimizer steps of a rollout batch, and what each data-parallel rank needs of it."""

    steps: Sequence[StepPlan]
    shares: Sequence[ShareSizes]
    """[data-parallel ranks]"""

    def fingerprint(self) -> str:
        """A short hash, equal on two ranks if and only if their plans are."""
        digest = hashlib.sha256()
        for step in self.steps:
            digest.update(step.microbatches.fingerprint().encode())
            digest.update(step.weights.tobytes() + step.advantages.tobytes())
            digest.update(step.filtered.computed.tobytes())
        return digest.hexdigest()[:16]


def plan_rollouts(
    summary: RolloutSummary, objective: ObjectiveConfig, packing: Packing, *, num_steps: int = 1
) -> RolloutPlan:
    """Plan the optimizer steps of a rollout batch.

    Args:
        summary: of the whole batch.
        objective: of the run.
        packing: of the run.
        num_steps: into which the groups are divided, in runs whose sizes differ by at most one.

    Raises:
        ValueError: a group or response that exceeds the token budget, or bad rewards, naming it.
    """
    bounds = [round(i * summary.num_groups / num_steps) for i in range(num_steps + 1)]
    steps = [
        _plan_step(summary, range(start, stop), objective.resolved(), packing)
        for start, stop in itertools.pairwise(bounds)
    ]
    shares = [
        ShareSizes.of(summary, np.concatenate([step.responses_of_rank(rank) for step in steps]))
        for rank in range(packing.data_parallel_size)
    ]
    return RolloutPlan(steps=steps, shares=shares)


def _plan_step(
    batch: RolloutSummary, groups: range, objective: ObjectiveConfig, packing: Packing
) -> StepPlan:
    summary = batch.of_groups(groups)
    terms = terms_of_groups(summary, objective)
    filtered = FilteredResponses(
        trained=_joined([of.trained for of in terms], np.bool_),
        computed=_joined([of.computed for of in terms], np.bool_),
        overlong=_joined([of.overlong for of in terms], np.bool_),
    )
    first_response = int(batch.group_offsets[groups.start])
    prompts = summary.prompt_lengths.tolist()
    # Of each group, the responses that run, as indices into the batch.
    running = [
        (first_response + start + np.flatnonzero(of.computed)).tolist()
        for start, of in zip(summary.group_offsets.tolist(), terms, strict=False)
    ]
    kept = [group for group, members in enumerate(running) if members]
    whole = [
        TreeShape.of_group(prompts[group], batch.response_lengths[running[group]]) for group in kept
    ]
    trees = whole
    if summary.prompt_routes is not None:
        trees = [_tree_of_routes(summary, group, terms[group].computed) for group in kept]
    units, responses, owners = packing.units(trees, [running[group] for group in kept])
    owners = [kept[owner] for owner in owners]
    spans = [
        trained_labels(unit, [prompts[owner]] * unit.num_sequences)
        for unit, owner in zip(units, owners, strict=True)
    ]
    labels = [
        trained_labels_of_lengths(unit, of_unit, batch.trained_lengths[list(members)])
        for unit, of_unit, members in zip(units, spans, responses, strict=True)
    ]
    return StepPlan(
        units=units,
        group_of_unit=[groups.start + owner for owner in owners],
        responses_of_unit=responses,
        prompt_lengths=batch.prompt_lengths,
        microbatches=packing.plan(
            units, labels=labels, spans=spans, names=[summary.sources[owner] for owner in owners]
        ),
        first_response=first_response,
        weights=_weights(summary, filtered.trained, objective),
        advantages=_joined([of.advantages for of in terms], np.float64),
        filtered=filtered,
        trained_tokens=int(summary.trained_lengths[filtered.trained].sum()),
        ungrouped_tokens=sum(tree.ungrouped_tokens for tree in whole),
        ungrouped_flops=sum(
            ungrouped_flops(
                packing.model_shape,
                tree,
                labels=np.append(0, batch.trained_lengths[running[group]]),
                spans=np.append(0, batch.response_lengths[running[group]]),
                trim_last_layer=packing.trim_last_layer,
            )
            for tree, group in zip(whole, kept, strict=True)
        ),
    )


def _tree_of_routes(summary: RolloutSummary, group: int, computed: NDArray[np.bool_]) -> TreeShape:
    """The tree of a group's computed responses, which share of their prompt what is routed alike.

    Args:
        summary: of all groups.
        group: index into them.
        computed: [responses of the group]
    """
    assert summary.prompt_routes is not None
    responses = slice(*summary.group_offsets[[group, group + 1]].tolist())
    return summary.prompt_routes.of_responses(responses).tree(
        np.flatnonzero(computed).tolist(),
        int(summary.prompt_lengths[group]),
        summary.response_lengths[responses][computed].tolist(),
    )


def terms_of_groups(summary: RolloutSummary, objective: ObjectiveConfig) -> list[GroupTerms]:
    """Of each group: advantages and filters.

    Args:
        summary: of the groups.
        objective: resolved.

    Raises:
        ValueError: see `group_terms`; the group's source is named.
    """
    found = []
    given = summary.largest_advantages
    bounds = itertools.pairwise(summary.group_offsets.tolist())
    for source, (start, stop) in zip(summary.sources, bounds, strict=True):
        try:
            found.append(
                group_terms(
                    summary.rewards[start:stop],
                    summary.response_lengths[start:stop],
                    summary.finished[start:stop],
                    objective,
                    given=None if given is None else given[start:stop],
                )
            )
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    return found


def _weights(
    summary: RolloutSummary, trained: NDArray[np.bool_], objective: ObjectiveConfig
) -> NDArray[np.float64]:
    """[responses] of each trained token; 0 for responses that do not count."""
    weights = np.zeros(len(trained))
    weights[trained] = token_weights(
        summary.trained_lengths[trained],
        objective.aggregation,
        max_response_length=objective.max_response_length,
    )
    return weights


def _joined(parts: Sequence[NDArray], dtype: type) -> NDArray:
    return np.concatenate([np.zeros(0, dtype=dtype), *parts])
