"""The candidate: shared prefixes, packed, parallel, through the trainer's own step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from equivalence.case import Case
from equivalence.microbatches import names_of
from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.config.packing import packing_of_run
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.layout import MicrobatchPlan, Packing, PrefixTree, rows_of
from megatron_prefix.model.build import build_model_chunks, model_shape
from megatron_prefix.model.full_tensors import (
    full_gradients,
    full_parameters,
    load_full_parameters,
)
from megatron_prefix.objective import PolicyMetrics
from megatron_prefix.rollouts.records import RolloutGroup
from megatron_prefix.training.batch import PackedBatch
from megatron_prefix.training.minibatch import build_minibatch
from megatron_prefix.training.optimizer import build_optimizer, build_scheduler
from megatron_prefix.training.step import (
    accumulate_gradients,
    compute_logprobs,
    reduce_sums,
    train_step,
)


def run_candidate(case: Case, initial: dict[str, torch.Tensor]) -> dict[str, Any] | None:
    """The same quantities by the trainer's own code; on rank 0, None elsewhere."""
    parallel, training = case.parallel, case.training
    with runtime(
        parallel,
        device=training.device,
        seed=1,
        timeout_minutes=training.timeout_minutes,
        float64=training.dtype == "float64",
    ) as place:
        chunks = build_model_chunks(
            case.model,
            parallel,
            training,
            use_distributed_optimizer=case.optimizer.use_distributed_optimizer,
        )
        load_full_parameters(chunks, initial)
        optimizer = build_optimizer(case.optimizer, chunks)
        optimizer.reload_model_params()
        scheduler = build_scheduler(case.optimizer, optimizer, total_steps=training.steps)
        packing = packing_of_run(
            training,
            parallel,
            model_shape=model_shape(case.model, chunks.config),
            data_parallel_size=place.data_parallel_size,
        )
        minibatch = build_minibatch(
            case.groups,
            case.objective,
            packing,
            attention=AttentionSetup.of(
                chunks.config,
                place.device,
                kernel=training.kernel,
                context_parallel_group=place.context_parallel_group,
            ),
            data_parallel_rank=place.data_parallel_rank,
        )
        plan = minibatch.step.microbatches
        slices = plan.microbatches[place.data_parallel_rank]
        slices_of_rows = [row for microbatch in slices for row in rows_of(microbatch)]
        rows = list(zip(minibatch.rows, slices_of_rows, strict=True))
        for row, parts in rows:
            names = names_of(case, minibatch.step, parts)
            row.reference_logprobs = _values_of_entries(
                row, [case.reference_logprobs[g][i] for g, i in names]
            )
            if case.recomputed_logprobs is not None:
                row.recomputed_logprobs = _values_of_entries(
                    row, [case.recomputed_logprobs[g][i] for g, i in names]
                )
        found = compute_logprobs(chunks, minibatch.batches, case.objective)
        mine = []
        if place.reports_metrics:
            for (row, parts), logprobs in zip(rows, found, strict=True):
                names = names_of(case, minibatch.step, parts)
                for sequence, token, value in zip(
                    row.sequence_ids.tolist(),
                    row.sequence_tokens.tolist(),
                    logprobs.tolist(),
                    strict=True,
                ):
                    mine.append((names[sequence], token, value))
        gathered: list[Any] = [None] * place.world_size
        dist.all_gather_object(gathered, mine)
        own_tokens = minibatch.packed_tokens / parallel.context_parallel_size
        own_labels = float(sum(len(row.labels) for row in minibatch.rows))
        counted = torch.tensor([own_tokens, own_labels], device=place.device)
        counted = reduce_sums(counted, contributes=place.reports_metrics)
        packed_tokens, labels = (round(count) for count in counted.tolist())
        result: dict[str, Any] = {
            "logprobs": _by_sequence(gathered),
            "num_microbatches": plan.num_microbatches,
            "packed_tokens": packed_tokens,
            "ungrouped_tokens": minibatch.step.ungrouped_tokens,
            "labels": labels,
            "split": _num_splits(plan),
            "series": sum(bool(p.parts) for rank in plan.microbatches for m in rank for p in m),
            "unshared": _num_unshared(case.groups, packing),
            "losses": [],
            "mtp_losses": [],
        }

        def losses_of(metrics: list[PolicyMetrics]) -> list[float]:
            objective = case.objective
            total = torch.zeros(2, dtype=torch.float64, device=place.device)
            for m in metrics:
                total[0] += m.policy_loss + objective.kl_coefficient * m.kl
                total[0] -= objective.entropy_coefficient * m.entropy
                total[1] += m.prediction_loss
            return reduce_sums(total, contributes=place.reports_metrics).tolist()

        accumulate_gradients(chunks, minibatch.batches, case.objective)
        result["gradients"] = full_gradients(chunks)
        # That was no step: expert biases, which move with the gradients, go back.
        load_full_parameters(chunks, initial)
        for _ in range(max(1, training.steps)):
            step = train_step(chunks, optimizer, scheduler, minibatch.batches, case.objective)
            loss, mtp_loss = losses_of(step.metrics)
            result["losses"].append(loss)
            if chunks.config.mtp_num_layers:
                result["mtp_losses"].append(mtp_loss)
        result["parameters"] = full_parameters(chunks)
        return result if place.is_main else None


def _values_of_entries(batch: PackedBatch, values: list[np.ndarray]) -> torch.Tensor:
    """[E] each entry's value, from those of all trained tokens of the microbatch's sequences."""
    starts = np.cumsum([0, *map(len, values)])
    flat, first = (
        torch.from_numpy(numbers).to(batch.sequence_ids.device)
        for numbers in (np.concatenate([*values, np.zeros(0)]), starts)
    )
    return flat[first[batch.sequence_ids] + batch.sequence_tokens]


def _by_sequence(
    ranks: list[list[tuple[tuple[int, int], int, float]]],
) -> dict[tuple[int, int], dict[int, float]]:
    """The log-probabilities that all ranks have found, by token of each sequence."""
    found: dict[tuple[int, int], dict[int, float]] = {}
    for part in ranks:
        for name, token, value in part:
            assert token not in found.setdefault(name, {}), f"{name}: token {token} ran twice"
            found[name][token] = value
    return found


def _num_splits(plan: MicrobatchPlan) -> int:
    """Groups that run in more than one microbatch."""
    runs: dict[int, int] = {}
    for rank in plan.microbatches:
        for microbatch in rank:
            for part in microbatch:
                runs[part.group] = runs.get(part.group, 0) + 1
    return sum(count > 1 for count in runs.values())


def _num_unshared(groups: Sequence[RolloutGroup], packing: Packing) -> int:
    """Groups that are packed without sharing their prompt, since that would not pay."""
    trees = [PrefixTree.from_groups([(group.prompt, group.responses)]) for group in groups]
    return sum(packing.group(tree).grouped_tokens > tree.grouped_tokens for tree in trees)
