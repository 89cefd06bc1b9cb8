"""One optimizer step over packed microbatches, by Megatron's own schedules.

Scaling, in one place: the per-token weights of a batch already hold every denominator over the
global batch, so a step's loss is the plain sum over all microbatches, data- and context-parallel
ranks. Megatron is kept from dividing it: `calculate_per_token_loss=True` turns off its division by
the number of microbatches and by the sizes of these groups, and `finalize_without_division` turns
off the division by a token count that this mode would do instead.
"""

from __future__ import annotations

import dataclasses
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
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from megatron_prefix.model.build import ModelChunks
from megatron_prefix.model.head import PredictedLabels
from megatron_prefix.objective import ObjectiveConfig, PolicyMetrics, policy_loss
from megatron_prefix.training.batch import PackedBatch
from megatron_prefix.training.predicted import prediction_loss
from megatron_prefix.training.series import BatchSeries, series_outputs, train_series


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
    batches: Sequence[PackedBatch | BatchSeries],
    objective: ObjectiveConfig,
    *,
    with_gradients: bool,
    replays: bool = True,
) -> list[Any]:
    """Run the microbatches through the pipeline.

    Args:
        batches: this data-parallel rank's microbatches, as many as on every other rank.
        with_gradients: run backward too, and let gradients accumulate.
        replays: routes of the microbatches are replayed, where they have any.

    Returns:
        On the last pipeline stage one item per microbatch: its `PolicyMetrics`, or (without
        gradients) for each of its rows the [E] log-probabilities of the entries. Elsewhere an empty
        list.
    """
    chunks.config.finalize_model_grads_func = finalize_without_division
    forward_backward = get_forward_backward_func()
    iterators: list[Iterator[PackedBatch | BatchSeries]] = [iter(batches) for _ in chunks.wrapped]
    return forward_backward(
        forward_step_func=functools.partial(
            _forward_step,
            chunks=chunks,
            objective=objective,
            with_gradients=with_gradients,
            replays=replays,
        ),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=chunks.wrapped if len(chunks.wrapped) > 1 else chunks.wrapped[0],
        num_microbatches=len(batches),
        # Each microbatch's own length travels with it (variable_seq_lengths).
        seq_length=batches[0].num_tokens,
        micro_batch_size=1,
        forward_only=not with_gradients,
        collect_non_loss_data=not with_gradients,
    )


def _forward_step(
    data_iterator: Iterator[PackedBatch | BatchSeries],
    model: torch.nn.Module,
    *,
    chunks: ModelChunks,
    objective: ObjectiveConfig,
    with_gradients: bool,
    replays: bool,
) -> tuple[Tensor, Any]:
    batch = next(data_iterator)
    run = functools.partial(
        _run_row,
        model=model,
        chunks=chunks,
        objective=objective,
        with_entropy=with_gradients and objective.needs_entropy,
        with_predictions=with_gradients,
        replays=replays,
    )
    if isinstance(batch, PackedBatch):
        loss = functools.partial(
            _loss,
            batch=batch,
            objective=objective,
            prediction_coefficient=chunks.config.mtp_loss_scaling_factor,
        )
        return run(batch), loss
    if not with_gradients:
        outputs = series_outputs(batch, run)
        found = tuple(_entries(output, row)[0].detach() for output, row in outputs)
        return outputs[0][0], lambda output, non_loss_data: found
    scale = chunks.config.grad_scale_func or (lambda loss: loss)
    if chunks.config.num_moe_experts is not None:
        # The schedule does so too, but behind this function, in which a series runs backward.
        MoEAuxLossAutoScaler.set_loss_scale(scale(torch.ones(1, device=batch.root.labels.device)))

    def scaled_loss(output: Tensor, row: PackedBatch) -> tuple[Tensor, PolicyMetrics]:
        loss, _, metrics = _loss(output, batch=row, objective=objective)
        return scale(loss), metrics

    metrics = train_series(batch, run, scaled_loss)
    # Backward is done; the schedule's own begins, and ends, at this number.
    done = torch.zeros((), device=batch.root.input_ids.device, requires_grad=True)
    return done, lambda output: (output, _no_count(output), metrics)


def _run_row(
    batch: PackedBatch,
    *,
    model: torch.nn.Module,
    chunks: ModelChunks,
    objective: ObjectiveConfig,
    with_entropy: bool,
    with_predictions: bool,
    replays: bool,
) -> Tensor:
    """The output of a model chunk: on the last stage [1, N, 2], or [1, N, 1] without entropies;
    behind these N what multi-token prediction trains on, depth after depth."""
    params = batch.params if replays else batch.params.without_routes()
    if params.predictions is not None and not with_predictions:
        params = dataclasses.replace(params, predictions=None)
    call = functools.partial(
        model,
        batch.input_ids,
        params.model_position_ids,
        attention_mask=None,
        packed_seq_params=params,
    )
    if chunks.head is None or model is not chunks.wrapped[-1]:
        return call()
    return chunks.head.log_probs(
        call,
        batch.label_positions,
        batch.labels,
        temperature=objective.temperature,
        with_entropy=with_entropy,
        train_entropy=with_entropy and objective.entropy_coefficient > 0,
        predictions=[
            PredictedLabels(depth=depth, positions=tokens.positions, labels=tokens.labels)
            for depth, tokens in zip(params.predictions or (), batch.predicted, strict=False)
        ],
    )


def _entries(output: Tensor, batch: PackedBatch) -> tuple[Tensor, ...]:
    """[E] log-probabilities of the entries, and their entropies where the output has them."""
    # Plain indexing: on CUDA its backward adds shared positions up in a fixed order.
    return output[0][batch.entry_labels].unbind(-1)


def _loss(
    output: Tensor,
    non_loss_data: bool = False,
    *,
    batch: PackedBatch,
    objective: ObjectiveConfig,
    prediction_coefficient: float = 0.0,
) -> Any:
    """output [1, N + M of all depths, 1 or 2] -> Megatron's (loss, token count, report), or a tuple
    of the [E] log-probabilities."""
    logprobs, *entropy = _entries(output, batch)
    if non_loss_data:
        return (logprobs.detach(),)
    corrects = objective.correction is not None
    loss, metrics = policy_loss(
        logprobs,
        old_logprobs=batch.recomputed_logprobs if corrects else batch.old_logprobs,
        sampled_logprobs=batch.old_logprobs if corrects else None,
        advantages=batch.advantages,
        weights=batch.weights,
        sequence_ids=batch.sequence_ids,
        num_sequences=batch.num_sequences,
        config=objective,
        reference_logprobs=batch.reference_logprobs,
        entropy=entropy[0] if entropy else None,
        context_parallel_group=batch.context_parallel_group,
    )
    if batch.predicted:
        predicted, weight = prediction_loss(output[0, len(batch.labels) :, 0], batch.predicted)
        loss = loss + prediction_coefficient * predicted
        metrics = dataclasses.replace(
            metrics, prediction_loss=predicted.detach().double(), prediction_weight=weight
        )
    return loss, _no_count(loss), metrics


def _no_count(loss: Tensor) -> Tensor:
    """Not used (see the head of the file), but its type and place are Megatron's."""
    return torch.zeros((), dtype=torch.int, device=loss.device)


def compute_logprobs(
    chunks: ModelChunks,
    batches: Sequence[PackedBatch | BatchSeries],
    objective: ObjectiveConfig,
    *,
    replays: bool = True,
) -> list[Tensor]:
    """Log-probabilities of the entries under the current weights, without gradients.

    Args:
        replays: see `run_schedule`.

    Returns:
        On the last pipeline stage one [E] tensor for each of the microbatches' `rows`; elsewhere
        an empty list.
    """
    with torch.no_grad():
        found = run_schedule(chunks, batches, objective, with_gradients=False, replays=replays)
    return [of_row for of_batch in found for of_row in of_batch]


def accumulate_gradients(
    chunks: ModelChunks, batches: Sequence[PackedBatch | BatchSeries], objective: ObjectiveConfig
) -> list[PolicyMetrics]:
    """Zero the gradients, run all microbatches forward and backward, and reduce over ranks."""
    for chunk in chunks.wrapped:
        chunk.zero_grad_buffer()
    return run_schedule(chunks, batches, objective, with_gradients=True)


def train_step(
    chunks: ModelChunks,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    batches: Sequence[PackedBatch | BatchSeries],
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
