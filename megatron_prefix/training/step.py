"""One optimizer step over packed microbatches, by Megatron's own schedules.

Scaling, in one place: the per-token weights of a batch already hold every denominator over the
global batch, so a step's loss is the plain sum over all microbatches, data- and context-parallel
ranks. Megatron is kept from dividing it: `calculate_per_token_loss=True` turns off its division by
the number of microbatches and by the sizes of these groups, and `finalize_without_division` turns
off the division by a token count that this mode would do instead.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_prefix.model.build import ModelChunks
from megatron_prefix.objective import ObjectiveConfig, PolicyMetrics, policy_loss
from megatron_prefix.training.batch import PackedBatch


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What an optimizer step reports."""

    grad_norm: float
    lr: float
    """The learning rate that the step used."""
    updated: bool
    """False where the optimizer skipped the step (an overflow)."""
    metrics: list[PolicyMetrics]
    """One per microbatch, on the last pipeline stage; empty elsewhere."""


def finalize_without_division(
    model: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: Any
) -> None:
    """Megatron's gradient reductions, without its division by the number of tokens."""
    finalize_model_grads(model, None, **kwargs)


def run_schedule(
    chunks: ModelChunks,
    batches: Sequence[PackedBatch],
    objective: ObjectiveConfig,
    *,
    forward_only: bool,
    collect_logprobs: bool = False,
) -> list[Any]:
    """Run the microbatches through the pipeline; gradients accumulate unless `forward_only`.

    Args:
        batches: this data-parallel rank's microbatches, as many as on every other rank.
        collect_logprobs: return log-probabilities instead of losses.

    Returns:
        On the last pipeline stage one item per microbatch: `PolicyMetrics`, or (with
        `collect_logprobs`) the [E] log-probabilities of its entries. Elsewhere an empty list.
    """
    chunks.config.finalize_model_grads_func = finalize_without_division
    forward_backward = get_forward_backward_func()
    iterators: list[Iterator[PackedBatch]] = [iter(batches) for _ in chunks.wrapped]
    return forward_backward(
        forward_step_func=functools.partial(
            _forward_step, chunks=chunks, objective=objective, with_entropy=not collect_logprobs
        ),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=chunks.wrapped if len(chunks.wrapped) > 1 else chunks.wrapped[0],
        num_microbatches=len(batches),
        # Each microbatch's own length travels with it (variable_seq_lengths).
        seq_length=max(batch.num_tokens for batch in batches),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect_logprobs,
    )


def _forward_step(
    data_iterator: Iterator[PackedBatch],
    model: torch.nn.Module,
    *,
    chunks: ModelChunks,
    objective: ObjectiveConfig,
    with_entropy: bool,
) -> tuple[Tensor, Any]:
    batch = next(data_iterator)
    call = functools.partial(
        model,
        batch.input_ids,
        batch.position_ids,
        attention_mask=None,
        packed_seq_params=batch.params,
    )
    if chunks.head is not None and model is chunks.wrapped[-1]:
        output = chunks.head.log_probs(
            call,
            batch.label_positions,
            batch.labels,
            temperature=objective.temperature,
            with_entropy=with_entropy,
            train_entropy=with_entropy and objective.entropy_coefficient > 0,
        )
    else:
        output = call()
    return output, functools.partial(_loss, batch=batch, objective=objective)


def _loss(
    output: Tensor, non_loss_data: bool = False, *, batch: PackedBatch, objective: ObjectiveConfig
) -> Any:
    """output [1, N, 2] -> Megatron's (loss, token count, report); or [1, N, 1] -> the [E]
    log-probabilities."""
    # Plain indexing: on CUDA its backward adds shared positions up in a fixed order.
    logprobs, *entropy = output[0][batch.entry_labels].unbind(-1)
    if non_loss_data:
        return logprobs.detach()
    loss, metrics = policy_loss(
        logprobs,
        old_logprobs=batch.old_logprobs,
        advantages=batch.advantages,
        weights=batch.weights,
        sequence_ids=batch.sequence_ids,
        num_sequences=batch.num_sequences,
        config=objective,
        reference_logprobs=batch.reference_logprobs,
        entropy=entropy[0],
        context_parallel_group=batch.context_parallel_group,
    )
    # The count is not used (see the head of the file), but its type and place are Megatron's.
    num_tokens = torch.zeros((), dtype=torch.int, device=loss.device)
    return loss, num_tokens, metrics


def compute_logprobs(
    chunks: ModelChunks, batches: Sequence[PackedBatch], objective: ObjectiveConfig
) -> list[Tensor]:
    """Log-probabilities of the entries under the current weights, without gradients.

    Returns:
        On the last pipeline stage one [E] tensor per microbatch; elsewhere an empty list.
    """
    with torch.no_grad():
        return run_schedule(chunks, batches, objective, forward_only=True, collect_logprobs=True)


def accumulate_gradients(
    chunks: ModelChunks, batches: Sequence[PackedBatch], objective: ObjectiveConfig
) -> list[PolicyMetrics]:
    """Zero the gradients, run all microbatches forward and backward, and reduce over ranks."""
    for chunk in chunks.wrapped:
        chunk.zero_grad_buffer()
    return run_schedule(chunks, batches, objective, forward_only=False)


def train_step(
    chunks: ModelChunks,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    batches: Sequence[PackedBatch],
    objective: ObjectiveConfig,
) -> StepResult:
    """Forward, backward, gradient reduction, clipping and one optimizer step.

    The scheduler is not optional: it also tells Megatron's optimizer which parameters (norms,
    biases) have no weight decay.
    """
    optimizer.zero_grad()
    metrics = accumulate_gradients(chunks, batches, objective)
    lr = float(optimizer.param_groups[0]["lr"])  # the scheduler sets it to the next step's
    updated, grad_norm, _ = optimizer.step()
    if updated:
        scheduler.step(increment=1)
    return StepResult(
        grad_norm=float(grad_norm or 0.0), lr=lr, updated=bool(updated), metrics=list(metrics)
    )


def reduce_sums(sums: Tensor, *, contributes: bool) -> Tensor:
    """Add up [K] sums over all ranks that contribute; every rank gets the result."""
    total = sums.to(torch.float64) if contributes else torch.zeros_like(sums, dtype=torch.float64)
    dist.all_reduce(total)
    return total
