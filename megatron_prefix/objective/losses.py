"""The loss of one microbatch's entries.

An entry is one trained token of one sequence. A position of the packed row that several sequences
share appears once per sequence, with that sequence's advantage and weight; its log-probability is
computed once and gathered, so autograd adds the gradients up.

Legend: E entries; all log-probabilities and entropies in nats.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.objective.config import KlEstimator, ObjectiveConfig
from megatron_prefix.objective.metrics import PolicyMetrics

LARGEST_LOG_RATIO = 10.0
"""Ratios to the old policy are at most exp(10), or 1 + clip_high where that is more."""


def policy_loss(
    logprobs: Tensor,
    *,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    config: ObjectiveConfig,
    reference_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    context_parallel_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, PolicyMetrics]:
    """The loss, a plain sum of weight * token loss over the entries, and its metrics.

    With r = exp(logprobs - old_logprobs), held below a bound (`LARGEST_LOG_RATIO`) beyond which it
    has no gradient, A the advantage, and clip(r) = r held between 1 - clip_low and 1 + clip_high,
    the token loss is

        grpo, dr_grpo, dapo   -min(r A, clip(r) A)
        gspo                  the same, r being the geometric mean of r over the sequence
        cispo                 -stop_gradient(clip(r)) A logprob
        supervised            -logprob

        + kl_coefficient * KL estimate - entropy_coefficient * entropy

    The weights normalise over the global batch (`token_weights`), so losses and gradients of
    microbatches and ranks add up, provided that gspo gets all entries of a sequence in one call,
    or in the calls of one context-parallel group.

    Args:
        logprobs: [E] log-probabilities under the policy that is trained.
        old_logprobs: [E] under the policy that sampled; None if that is the very policy that is
            trained (then every ratio is 1, and its gradient is kept).
        advantages: [E] advantage of each entry's sequence.
        weights: [E] weight of each entry.
        sequence_ids: [E] int64, each entry's sequence, from 0 to num_sequences - 1; only gspo
            reads them.
        num_sequences: number of sequences in this call.
        config: which objective; a field left at None takes its name's default.
        reference_logprobs: [E] under the reference policy; needed for a kl_coefficient above 0,
            otherwise only reported.
        entropy: [E] of the predicted distributions; needed for an entropy_coefficient above 0,
            otherwise only reported.
        context_parallel_group: the ranks that this microbatch is distributed over; gspo sums each
            sequence over them (collective, backward too). None: all entries are here.

    Returns:
        The loss (a scalar in the dtype of logprobs, at least float32; 0 with a graph for no
        entries) and its detached sums. Gradients flow to logprobs and entropy only.

    Raises:
        ValueError: shapes that differ, or a coefficient above 0 whose input is missing.
    """
    config = config.resolved()
    _check_shapes(
        logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        weights=weights,
        sequence_ids=sequence_ids,
        reference_logprobs=reference_logprobs,
        entropy=entropy,
    )
    _check_given("kl_coefficient", config.kl_coefficient, "reference_logprobs", reference_logprobs)
    _check_given("entropy_coefficient", config.entropy_coefficient, "entropy", entropy)
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    logprobs = logprobs.to(dtype)
    current = logprobs.detach()
    old = current if old_logprobs is None else old_logprobs.detach().to(dtype)
    advantages = advantages.detach().to(dtype)
    weights = weights.detach().to(dtype)

    log_ratio = logprobs - old
    if config.name == "gspo":
        log_ratio = _sequence_mean(log_ratio, sequence_ids, num_sequences, context_parallel_group)[
            sequence_ids
        ]
    ratio = _bounded_ratio(log_ratio, config)
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    if config.name == "supervised":
        token_loss = -logprobs
    elif config.name == "cispo":
        token_loss = -(clipped_ratio.detach() * advantages * logprobs)
    else:
        token_loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages)

    kl = None
    loss = (weights * token_loss).sum()
    if reference_logprobs is not None:
        reference = reference_logprobs.detach().to(dtype)
        kl = kl_per_token(logprobs, reference, config.kl_estimator)
        if config.kl_coefficient > 0:
            loss = loss + config.kl_coefficient * (weights * kl).sum()
    if entropy is not None and config.entropy_coefficient > 0:
        loss = loss - config.entropy_coefficient * (weights * entropy.to(dtype)).sum()

    clipped_low, clipped_high = _clipped(ratio.detach(), advantages, config)
    metrics = PolicyMetrics(
        policy_loss=_total(weights * token_loss),
        kl=_total(weights.new_zeros(()) if kl is None else weights * kl),
        entropy=_total(weights.new_zeros(()) if entropy is None else weights * entropy.to(dtype)),
        weight=_total(weights),
        tokens=_total(torch.ones_like(weights)),
        clipped_low=_total(clipped_low),
        clipped_high=_total(clipped_high),
        ratio=_total(ratio),
        ratio_squared=_total(ratio.detach().double().square()),
        old_kl=_total(kl_per_token(old, current, "k3")),
    )
    return loss, metrics


def kl_per_token(logprobs: Tensor, reference_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimate of KL(policy || reference) from each sampled token (Schulman 2020).

    With d = reference - logprob, for tokens that the policy sampled:

        k1  -d                unbiased, may be negative. Its gradient is that of the
                              log-probability: 0 in expectation, so as a penalty it adds noise and
                              restrains nothing.
        k2  d^2 / 2           biased as a value; its gradient, -d times that of the
                              log-probability, is the reverse KL's, KL(policy || reference), in
                              expectation.
        k3  exp(d) - 1 - d    unbiased and never negative, the one in GRPO's eq. 4. Its gradient
                              is the forward KL's, KL(reference || policy), in expectation.

    Beyond d = `LARGEST_LOG_RATIO`, k3 goes on as the straight line that touches it there, so that
    one token's gradient stays finite.

    Once the policy has moved away from the one that sampled, these hold only approximately: no
    ratio corrects them, as in the papers.

    Args:
        logprobs: [E] under the policy; carries the gradient.
        reference_logprobs: [E] under the reference.
        estimator: 'k1', 'k2' or 'k3'.

    Returns:
        [E] in nats.
    """
    difference = reference_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return 0.5 * difference.square()
    assert estimator == "k3", estimator
    bounded = difference.clamp(max=LARGEST_LOG_RATIO)
    beyond = difference - bounded
    return torch.expm1(bounded) + bounded.exp() * beyond - difference


def _bounded_ratio(log_ratio: Tensor, config: ObjectiveConfig) -> Tensor:
    """exp(log_ratio), constant and without gradient beyond a bound.

    A token that the old policy held for nearly impossible has a ratio that overflows: 0 times
    infinity in the branch that clipping does not take would make every gradient NaN. Ratios within
    the clip range are what they are.
    """
    bound = max(LARGEST_LOG_RATIO, math.log1p(config.clip_high))
    return log_ratio.clamp(max=bound).exp()


def _sequence_mean(
    values: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """[num_sequences] means of the entries of each sequence; 0 for one without entries.

    Over the entries of all ranks of `group`.

    Accumulating index_put and plain indexing, since the CUDA kernels of index_add and of
    index_select's backward add in no fixed order.
    """
    zeros = values.new_zeros(num_sequences)
    sums = zeros.index_put((sequence_ids,), values, accumulate=True)
    counts = zeros.index_put((sequence_ids,), torch.ones_like(values), accumulate=True)
    if group is not None:
        sums, counts = _SumOverRanks.apply(torch.stack((sums, counts)), group).unbind()
    return sums / counts.clamp(min=1)


class _SumOverRanks(torch.autograd.Function):
    """The sum over a group's ranks, each of which goes on to a loss of its own.

    The losses are added up, so the gradient of the sum is that of all ranks together.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The same on every rank."""
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Summed over the ranks' losses."""
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _clipped(ratio: Tensor, advantages: Tensor, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Which entries clipping changes from below and from above.

    The minimum of the clipped objectives takes the clipped side only where the advantage would
    push the ratio further out; cispo clips its weight whatever the advantage.
    """
    if config.name == "supervised":
        nothing = torch.zeros_like(ratio, dtype=torch.bool)
        return nothing, nothing
    low, high = ratio < 1 - config.clip_low, ratio > 1 + config.clip_high
    if config.name == "cispo":
        return low, high
    return low & (advantages < 0), high & (advantages > 0)


def _total(values: Tensor) -> Tensor:
    return values.detach().sum(dtype=torch.float64)


def _check_shapes(logprobs: Tensor, **per_entry: Tensor | None) -> None:
    if logprobs.dim() != 1:
        raise ValueError(f"logprobs have shape {list(logprobs.shape)}: give one per entry, [E]")
    for name, value in per_entry.items():
        if value is not None and value.shape != logprobs.shape:
            raise ValueError(
                f"{name} has shape {list(value.shape)}, logprobs have {list(logprobs.shape)}: "
                "give one value per entry"
            )


def _check_given(option: str, coefficient: float, name: str, value: Tensor | None) -> None:
    if coefficient > 0 and value is None:
        raise ValueError(
            f"{option}={coefficient!r} needs {name}, which is None: compute it, or set {option}: 0"
        )
