"""The KL penalty as a part of the reward, as PPO for language models has it (Ouyang et al. 2022,
arXiv 2203.02155, eq. 2): the advantages are those of

    reward - kl_coefficient * sum of (log pi_old - log pi_reference)

over the response's trained tokens, and the loss itself has no penalty.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.objective.ratio import known_or
from megatron_prefix.rollouts.summary import RolloutSummary
from megatron_prefix.training.minibatch import Minibatch
from megatron_prefix.training.step import reduce_sums
from megatron_prefix.training.step_plan import terms_of_groups


def put_kl_into_advantages(
    minibatches: Sequence[Minibatch],
    summary: RolloutSummary,
    objective: ObjectiveConfig,
    *,
    device: torch.device,
    contributes: bool,
) -> None:
    """Replace the advantages of all rows. Collective over all ranks.

    Args:
        minibatches: of this rank, whose rows have old and reference log-probabilities (on the last
            pipeline stage).
        summary: of the rollout batch.
        objective: with the coefficient of the step.
        device: of the rows.
        contributes: whether this rank's entries count, one of those that hold the same.

    Raises:
        ValueError: rewards that are out of range with the penalty, naming the group.
    """
    rows = [
        (row, torch.from_numpy(responses).to(device)[row.sequence_ids])
        for minibatch in minibatches
        for row, responses in zip(minibatch.rows, minibatch.responses_of_rows, strict=True)
    ]
    drift = torch.zeros(len(summary.rewards), dtype=torch.float64, device=device)
    for row, of_entry in rows:
        old = row.old_logprobs if row.recomputed_logprobs is None else row.recomputed_logprobs
        if old is None or row.reference_logprobs is None:
            continue  # not the last stage
        reference = row.reference_logprobs.double()
        known, _ = known_or(old.double(), reference)
        drift.index_put_((of_entry,), known - reference, accumulate=True)
    total = reduce_sums(drift, contributes=contributes).cpu().numpy()
    rewards = summary.rewards - objective.kl_coefficient * total
    terms = terms_of_groups(dataclasses.replace(summary, rewards=rewards), objective.resolved())
    advantages = torch.from_numpy(np.concatenate([of.advantages for of in terms])).to(device)
    for row, of_entry in rows:
        row.advantages = advantages[of_entry]
