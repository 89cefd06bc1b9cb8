"""The loss of one microbatch's entries.

An entry is one trained token of one sequence. A position of the packed row that several sequences
share appears once per sequence, with that sequence's advantage and weight; its log-probability is
computed once and gathered, so autograd adds the gradients up.

Legend: E entries; all log-probabilities and entropies in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.objective.config import ObjectiveConfig
from megatron_prefix.objective.corrections import correction
from megatron_prefix.objective.histogram import log_ratio_counts
from megatron_prefix.objective.kl import kl_per_token
from megatron_prefix.objective.losses import OBJECTIVES, Objective, Terms
from megatron_prefix.objective.metrics import PolicyMetrics
from megatron_prefix.objective.ratio import LARGEST_LOG_RATIO, bounded_ratio, known_or
from megatron_prefix.objective.sequences import Sequences


def policy_loss(
    logprobs: Tensor,
    *,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    config: ObjectiveConfig,
    sampled_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    context_parallel_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, PolicyMetrics]:
    """The loss, a plain sum over the entries, and its metrics.

        sum of weight * (correction * token loss
                         + kl_coefficient * KL estimate - entropy_coefficient * entropy)

    The token loss is that of `losses/<name>.py`. Its ratio r = exp(logprobs - old_logprobs) is held
    below a bound (`LARGEST_LOG_RATIO`) beyond which it has no gradient. The correction is 1, or
    what `corrections.correction` says. With `kl_in: reward` the advantages have the KL penalty, and
    the loss has none. An entry whose old or sampled log-probability is not known (`ratio.is_known`)
    has no token loss, except with `supervised`, and takes no part in the ratio of its sequence.

    The weights normalise over the global batch (`token_weights`), so losses and gradients of
    microbatches and ranks add up, provided that ratios of sequences get all entries of a sequence
    in one call, or in the calls of one context-parallel group.

    Args:
        logprobs: [E] log-probabilities under the policy that is trained.
        old_logprobs: [E] under the old policy, which the ratio compares with; None if that is the
            very policy that is trained (then every ratio is 1, and its gradient is kept).
        advantages: [E] advantage of each entry.
        weights: [E] weight of each entry.
        sequence_ids: [E] int64, each entry's sequence, from 0 to num_sequences - 1.
        num_sequences: number of sequences in this call.
        config: which objective; a field left at None takes its name's default.
        sampled_logprobs: [E] under the policy that sampled, where it is not the old one; needed by
            `config.correction`, and only with it.
        reference_logprobs: [E] under the reference policy; needed for a kl_coefficient above 0,
            otherwise only reported.
        entropy: [E] of the predicted distributions; needed for an entropy_coefficient above 0,
            otherwise only reported.
        context_parallel_group: the ranks that this microbatch is distributed over, which sums over
            sequences add up (collective, backward too). None: all entries are here.

    Returns:
        The loss (a scalar in the dtype of logprobs, at least float32; 0 with a graph for no
        entries) and its detached sums. Gradients flow to logprobs and entropy only.

    Raises:
        ValueError: shapes that differ, or an option whose input is missing.
    """
    config = config.resolved()
    _check_shapes(
        logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        weights=weights,
        sequence_ids=sequence_ids,
        sampled_logprobs=sampled_logprobs,
        reference_logprobs=reference_logprobs,
        entropy=entropy,
    )
    _check_given("kl_coefficient", config.kl_coefficient, "reference_logprobs", reference_logprobs)
    _check_given("entropy_coefficient", config.entropy_coefficient, "entropy", entropy)
    if (sampled_logprobs is None) != (config.correction is None):
        raise ValueError(
            "sampled_logprobs are for correction, and correction needs them: give both or neither"
        )
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    logprobs = logprobs.to(dtype)
    current = logprobs.detach()
    advantages = advantages.detach().to(dtype)
    weights = weights.detach().to(dtype)
    sequences = Sequences(ids=sequence_ids, count=num_sequences, group=context_parallel_group)

    old = _old_policy(current, old_logprobs, sampled_logprobs, sequences, config)
    terms = _terms(logprobs, old, advantages, sequences, config)
    objective = OBJECTIVES[config.name]
    policy_loss_of_entry = weights * objective.token_loss(terms)
    if objective.uses_ratio:
        policy_loss_of_entry = policy_loss_of_entry * old.loss_weights
    loss = policy_loss_of_entry.sum()
    kl = None
    if reference_logprobs is not None:
        reference = reference_logprobs.detach().to(dtype)
        kl = weights * kl_per_token(logprobs, reference, config.kl_estimator)
        if config.kl_coefficient > 0 and config.kl_in == "loss":
            loss = loss + config.kl_coefficient * kl.sum()
    if entropy is not None:
        entropy = weights * entropy.to(dtype)
        if config.entropy_coefficient > 0:
            loss = loss - config.entropy_coefficient * entropy.sum()

    zeros = torch.zeros_like(current)
    return loss, PolicyMetrics(
        policy_loss=_total(policy_loss_of_entry),
        kl=_total(zeros if kl is None else kl),
        entropy=_total(zeros if entropy is None else entropy),
        prediction_loss=_total(zeros),
        prediction_weight=_total(zeros),
        weight=_total(weights),
        tokens=_total(torch.ones_like(weights)),
        old_kl=_total(kl_per_token(old.logprobs, current, "k3")),
        **_sums_of_ratios(terms, old, objective),
    )


def _sums_of_ratios(terms: Terms, old: _OldPolicy, objective: Objective) -> dict[str, Tensor]:
    """The fields of `PolicyMetrics` that ratios and corrections make."""
    clipped = objective.clipped(terms)
    ratio = terms.ratio.detach().double()
    mismatch = kl_per_token(-old.log_rho, torch.zeros_like(old.log_rho), "k3")
    return {
        "unknown": _total(~old.known),
        "clipped_low": _total(clipped.low & old.known),
        "clipped_high": _total(clipped.high & old.known),
        "clipped_dual": _total(clipped.dual & old.known),
        "ratio": _total(ratio * old.known),
        "ratio_squared": _total(ratio.square() * old.known),
        "ratio_counts": log_ratio_counts(ratio.log(), old.known),
        "corrected": _total(old.corrected),
        "correction_changed": _total(old.changed),
        "correction_weight": _total(old.loss_weights * old.corrected),
        "mismatch_kl": _total(mismatch * old.corrected),
        "mismatch_counts": log_ratio_counts(old.log_rho, old.corrected),
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class _OldPolicy:
    """The policy that the ratio compares with, and how far the one that sampled is from it."""

    logprobs: Tensor
    """[E], those of the current policy where they are not known."""
    known: Tensor
    """[E] bool: whether the log-probabilities that are needed are."""
    loss_weights: Tensor
    """[E] what multiplies the policy loss: the correction, and 0 where not known."""
    log_rho: Tensor
    """[E] log of the old policy's over the sampling policy's probability; 0 without correction."""
    corrected: Tensor
    """[E] bool: known, and there is a correction."""
    changed: Tensor
    """[E] bool: entries whose weight the correction's bounds have changed."""


def _old_policy(
    current: Tensor,
    old_logprobs: Tensor | None,
    sampled_logprobs: Tensor | None,
    sequences: Sequences,
    config: ObjectiveConfig,
) -> _OldPolicy:
    old, known = current, torch.ones_like(current, dtype=torch.bool)
    if old_logprobs is not None:
        old, known = known_or(old_logprobs.detach().to(current.dtype), current)
    if config.correction is None or sampled_logprobs is None:
        return _OldPolicy(
            logprobs=old,
            known=known,
            loss_weights=known.to(current.dtype),
            log_rho=torch.zeros_like(current),
            corrected=torch.zeros_like(known),
            changed=torch.zeros_like(known),
        )
    sampled, sampled_known = known_or(sampled_logprobs.detach().to(current.dtype), old)
    known = known & sampled_known
    log_rho = old - sampled
    found = correction(log_rho, known, sequences=sequences, config=config.correction)
    return _OldPolicy(
        logprobs=old,
        known=known,
        loss_weights=found.weights,
        log_rho=log_rho,
        corrected=known,
        changed=found.changed,
    )


def _terms(
    logprobs: Tensor,
    old: _OldPolicy,
    advantages: Tensor,
    sequences: Sequences,
    config: ObjectiveConfig,
) -> Terms:
    log_ratio = logprobs - old.logprobs
    if OBJECTIVES[config.name].ratio_of == "sequence":
        log_ratio = sequences.means(log_ratio, old.known)
    largest = max(1 + config.clip_high, config.dual_clip or 1.0)
    ratio = bounded_ratio(log_ratio, max(LARGEST_LOG_RATIO, math.log(largest)))
    return Terms(
        logprobs=logprobs,
        ratio=ratio,
        clipped_ratio=ratio.clamp(1 - config.clip_low, 1 + config.clip_high),
        advantages=advantages,
        dual_clip=config.dual_clip,
    )


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
