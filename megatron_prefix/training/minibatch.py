"""From a rollout batch to the microbatches of each optimizer step.

Every rank holds the same groups and derives the same plan; a rank builds the tensors of its own
data-parallel share only. All normalisation (advantages within a group, weights over the optimizer
step's sequences) happens here, before anything is split.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_prefix.layout import (
    MicrobatchPlan,
    Packing,
    PrefixTree,
    pack,
    trained_labels,
)
from megatron_prefix.objective import ObjectiveConfig, group_advantages, token_weights
from megatron_prefix.rollouts.records import RolloutGroup
from megatron_prefix.training.batch import PackedBatch, TrainedSequence, build_batch


@dataclass(frozen=True, kw_only=True)
class Minibatch:
    """One optimizer step's share of this data-parallel rank, and what it is part of."""

    plan: MicrobatchPlan
    batches: list[PackedBatch]
    """This rank's microbatches."""
    knows_old_logprobs: bool
    """Whether every group of the step came with them (the same answer on every rank)."""
    packed_tokens: int
    """Tokens that all ranks run, padding included."""
    ungrouped_tokens: int
    """Tokens that a run without sharing would have computed."""
    flops: float
    """Predicted forward FLOPs of all ranks."""
    ungrouped_flops: float

    def distribution(self) -> str:
        """How this rank thinks its rows are distributed over context-parallel ranks."""
        return "; ".join(
            f"microbatch {index}: {batch.params.plan.shards.summary()}"
            for index, batch in enumerate(self.batches)
        )


def split_groups(groups: Sequence[RolloutGroup], parts: int) -> list[list[RolloutGroup]]:
    """Divide a rollout batch into `parts` runs of groups whose sizes differ by at most one."""
    bounds = [round(i * len(groups) / parts) for i in range(parts + 1)]
    return [list(groups[a:b]) for a, b in itertools.pairwise(bounds)]


def trained_sequences(
    groups: Sequence[RolloutGroup], objective: ObjectiveConfig
) -> list[list[TrainedSequence]]:
    """Advantages and weights of every response, over the whole optimizer step.

    Returns:
        For each group, for each of its responses, what the objective needs.
    """
    objective = objective.resolved()
    _check_old_logprobs(groups)
    lengths = [len(response) for group in groups for response in group.responses]
    weights = iter(
        token_weights(
            lengths,
            objective.aggregation,
            max_response_length=objective.max_response_length,
        )
    )
    sequences = []
    for group in groups:
        try:
            advantages = group_advantages(
                group.rewards, objective.advantage, eps=objective.advantage_epsilon
            )
        except ValueError as error:
            raise ValueError(f"{group.source}: {error}") from error
        old = group.old_logprobs or [None] * len(group.responses)
        sequences.append(
            [
                TrainedSequence(
                    first_trained=len(group.prompt),
                    weight=float(next(weights)),
                    advantage=float(advantage),
                    old_logprobs=None if values is None else np.asarray(values),
                )
                for advantage, values in zip(advantages, old, strict=True)
            ]
        )
    return sequences


def _check_old_logprobs(groups: Sequence[RolloutGroup]) -> None:
    """All or none: otherwise a response's ratio would depend on which groups share its row."""
    known = {group.old_logprobs is not None: group.source for group in groups}
    if len(known) > 1:
        raise ValueError(
            f"{known[False]}: old_logprobs: missing, but {known[True]}, of the same optimizer "
            "step, has them; give them for all groups or for none"
        )


def build_minibatch(
    groups: Sequence[RolloutGroup],
    objective: ObjectiveConfig,
    packing: Packing,
    *,
    data_parallel_rank: int,
    device: torch.device,
    kernel: str | None = None,
    deterministic: bool = False,
    context_parallel_group: dist.ProcessGroup | None = None,
) -> Minibatch:
    """Plan one optimizer step over all ranks and build this rank's microbatches.

    Not collective: context-parallel ranks compare `Minibatch.distribution` before they run it.

    Raises:
        ValueError: a group or response that exceeds the token budget, or bad rewards, naming it.
    """
    whole = [PrefixTree.from_groups([(group.prompt, group.responses)]) for group in groups]
    units, sequences, owners = packing.units(whole, trained_sequences(groups, objective))
    plan = packing.plan(
        units,
        labels=[
            trained_labels(tree, [s.first_trained for s in members])
            for tree, members in zip(units, sequences, strict=True)
        ],
        names=[groups[group].source for group in owners],
    )
    context_parallel_size = 1
    if context_parallel_group is not None:
        context_parallel_size = dist.get_world_size(context_parallel_group)
    batches: list[PackedBatch] = []
    packed_tokens, flops = 0, 0.0
    for rank, microbatches in enumerate(plan.microbatches):
        for slices in microbatches:
            tree = packing.microbatch(units, slices)
            members = [sequences[s.group][i] for s in slices for i in s.sequences]
            labels = trained_labels(tree, [member.first_trained for member in members])
            flops += packing.model_shape.tree_flops(
                tree, labels=labels, trim_last_layer=packing.trim_last_layer
            )
            layout = pack(tree, pad_to_multiple=packing.pad_to_multiple)
            packed_tokens += layout.num_tokens
            if rank == data_parallel_rank:
                batches.append(
                    build_batch(
                        layout,
                        members,
                        device=device,
                        kernel=kernel,
                        deterministic=deterministic,
                        context_parallel_group=context_parallel_group,
                        check_equal=False,
                        trim_last_layer=packing.trim_last_layer,
                        output_multiple=packing.pad_to_multiple // context_parallel_size,
                    )
                )
    return Minibatch(
        plan=plan,
        batches=batches,
        knows_old_logprobs=all(group.old_logprobs is not None for group in groups),
        packed_tokens=packed_tokens,
        ungrouped_tokens=sum(tree.ungrouped_tokens for tree in whole),
        flops=flops,
        ungrouped_flops=sum(
            packing.model_shape.ungrouped_flops(tree, trim_last_layer=packing.trim_last_layer)
            for tree in whole
        ),
    )
