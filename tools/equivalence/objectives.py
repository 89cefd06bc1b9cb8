"""The reference's objectives: whole sequences, one at a time, written out as in the papers.

It shares no code with `megatron_prefix.objective`, and takes from its configuration only what an
option says. A file of `megatron_prefix/objective/losses` names each paper.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equivalence.case import Case, trained_tokens
from megatron_prefix.objective import ObjectiveConfig

_CLIP_RANGES = {
    "grpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "cispo": (1.0, 4.0),
    "supervised": (0.2, 0.2),
}
_AGGREGATIONS = {"grpo": "sequence_mean", "gspo": "sequence_mean", "dr_grpo": "constant"}
_IMPOSSIBLE = -1000.0


@dataclass(frozen=True, kw_only=True)
class ResponseTerms:
    """What a response brings to the loss."""

    advantage: float
    weight: float
    """Of each of its trained tokens."""
    computed: bool
    """Whether the candidate has to run it."""


def response_terms(case: Case) -> list[list[ResponseTerms]]:
    """The terms of every response, group by group."""
    objective = case.objective
    found: list[list[ResponseTerms]] = []
    for group in case.groups:
        counts = [len(trained_tokens(group, i)) for i in range(len(group.responses))]
        rewards = np.array(group.rewards, dtype=np.float64)
        kept = [True] * len(rewards)
        overlong = objective.overlong
        if overlong is not None and overlong.kind == "penalty":
            for i, response in enumerate(group.responses):
                free = overlong.length - overlong.buffer
                share = (len(response) - free) / overlong.buffer
                rewards[i] -= overlong.factor * min(max(share, 0.0), 1.0)
        elif overlong is not None:
            kept = [bool(finished) for finished in group.finished]
        advantages = _advantages(rewards, objective)
        skips = objective.zero_advantages == "skip"
        found.append(
            [
                ResponseTerms(
                    advantage=float(advantage),
                    weight=float(count) if keep else 0.0,
                    computed=keep and not (skips and advantage == 0),
                )
                for advantage, keep, count in zip(advantages, kept, counts, strict=True)
            ]
        )
    return _with_weights(found, objective)


def _advantages(rewards: np.ndarray, objective: ObjectiveConfig) -> np.ndarray:
    kind = objective.advantage or ("mean" if objective.name == "dr_grpo" else "std")
    if len(set(rewards.tolist())) == 1:
        return np.zeros_like(rewards)
    if kind == "std":
        spread = rewards.std(ddof=1) + objective.advantage_epsilon
        return (rewards - rewards.mean()) / spread
    if kind == "mean":
        return rewards - rewards.mean()
    others = (rewards.sum() - rewards) / (len(rewards) - 1)
    return rewards - others


def _with_weights(
    terms: list[list[ResponseTerms]], objective: ObjectiveConfig
) -> list[list[ResponseTerms]]:
    """The number of trained tokens, which stands for the weight, becomes the weight."""
    aggregation = objective.aggregation or _AGGREGATIONS.get(objective.name, "token_mean")
    counts = [of.weight for group in terms for of in group if of.weight]

    def weight(tokens: float) -> float:
        if tokens == 0:
            return 0.0
        if aggregation == "sequence_mean":
            return 1 / (len(counts) * tokens)
        if aggregation == "token_mean":
            return 1 / sum(counts)
        return 1 / (len(counts) * objective.max_response_length)

    return [[dataclasses.replace(of, weight=weight(of.weight)) for of in group] for group in terms]


def token_losses(
    logprobs: Tensor,
    entropy: Tensor,
    *,
    old: Tensor,
    sampled: Tensor | None,
    reference: Tensor,
    advantage: float,
    objective: ObjectiveConfig,
) -> Tensor:
    """The loss of each trained token of a response, without its weight.

    Args:
        logprobs, entropy: [tokens] of the policy.
        old: of the policy that the ratio compares with.
        sampled: of the policy that sampled, where a correction compares it with the old one.
        reference: of the reference policy.
        advantage: of the response.
        objective: whose loss.
    """
    known = old > _IMPOSSIBLE
    correction = torch.ones_like(old)
    if sampled is not None:
        known = known & (sampled > _IMPOSSIBLE)
        correction = _correction(old - sampled, known, objective)
    log_ratio = logprobs - torch.where(known, old, logprobs.detach())
    if objective.name == "gspo":
        log_ratio = (log_ratio[known].sum() / max(int(known.sum()), 1)).expand_as(log_ratio)
    policy = _policy_losses(logprobs, torch.exp(log_ratio), advantage, objective)
    if objective.name != "supervised":  # which looks at no other policy
        policy = torch.where(known, correction * policy, 0.0 * policy)
    drift = reference - logprobs
    kl = {"k1": -drift, "k2": drift**2 / 2, "k3": torch.exp(drift) - drift - 1}
    return (
        policy
        + objective.kl_coefficient * kl[objective.kl_estimator]
        - objective.entropy_coefficient * entropy
    )


def _policy_losses(
    logprobs: Tensor, ratio: Tensor, advantage: float, objective: ObjectiveConfig
) -> Tensor:
    low, high = _CLIP_RANGES[objective.name]
    low = low if objective.clip_low is None else objective.clip_low
    high = high if objective.clip_high is None else objective.clip_high
    clipped = torch.clamp(ratio, 1 - low, 1 + high)
    if objective.name == "supervised":
        return -logprobs
    if objective.name == "cispo":
        return -clipped.detach() * advantage * logprobs
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    if objective.dual_clip is not None and advantage < 0:
        surrogate = torch.clamp(surrogate, min=objective.dual_clip * advantage)
    return -surrogate


def _correction(log_rho: Tensor, known: Tensor, objective: ObjectiveConfig) -> Tensor:
    """[tokens] the weights of importance sampling."""
    options = objective.correction
    assert options is not None
    if options.level == "token":
        rho = torch.exp(log_rho)
    elif options.level == "sequence":
        rho = torch.exp(log_rho[known].sum()).expand_as(log_rho)
    else:
        rho = torch.exp(log_rho[known].sum() / max(int(known.sum()), 1)).expand_as(log_rho)
    if options.kind == "truncate":
        return torch.clamp(rho, options.low, options.high)
    return torch.where((rho >= options.low) & (rho <= options.high), rho, torch.zeros_like(rho))
