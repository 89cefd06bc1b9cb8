"""Advantages of a batch's tokens, where its records give rewards of turns or advantages themselves.

Rank 0 computes them, before the batch is summed up and planned: the other ranks do not know where a
response's turns are.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.objective import ObjectiveConfig, turn_advantages
from megatron_prefix.rollouts.records import RolloutBatch
from megatron_prefix.rollouts.turns import turn_ends


def with_token_advantages(batch: RolloutBatch, objective: ObjectiveConfig) -> RolloutBatch:
    """The batch with rewards of turns replaced by the advantages that they make.

    Raises:
        ValueError: the objective uses no advantages of tokens, or no old log-probabilities, naming
            a record that has some.
    """
    if batch.old_logprobs is not None and objective.name == "supervised":
        raise ValueError(
            f"{batch.sources[0]}: old_logprobs: given, but objective.name: supervised does not use "
            "them; leave them out, or set another objective"
        )
    if batch.turn_rewards is None and batch.advantages is None:
        return batch
    objective = objective.resolved()
    advantages = np.full(len(batch.response_tokens), np.nan)
    if batch.advantages is not None:
        advantages[:] = batch.advantages
    if batch.turn_rewards is not None:
        for group in range(batch.num_groups):
            _fill_group(batch, group, objective, advantages)
    _check_used(batch, objective, advantages)
    advantages.flags.writeable = False
    return dataclasses.replace(batch, turn_rewards=None, advantages=advantages)


def _fill_group(
    batch: RolloutBatch,
    group: int,
    objective: ObjectiveConfig,
    advantages: NDArray[np.float64],
) -> None:
    """Write the advantages of a group's trained tokens, if it has rewards of turns."""
    responses = batch.responses_of(group)
    tokens = slice(batch.tokens_of(responses[0]).start, batch.tokens_of(responses[-1]).stop)
    offsets = batch.response_offsets[responses.start : responses.stop + 1] - tokens.start
    mask = None if batch.loss_mask is None else batch.loss_mask[tokens]
    ends = turn_ends(mask, offsets)
    assert batch.turn_rewards is not None and objective.advantage is not None
    rewards = batch.turn_rewards[tokens][ends]
    if np.isnan(rewards).all():
        return
    firsts = np.searchsorted(ends, offsets)
    found = np.concatenate(
        turn_advantages(
            np.split(rewards, firsts[1:-1]),
            objective.advantage,
            of=objective.turn_advantage,
            eps=objective.advantage_epsilon,
        )
    )
    # A token belongs to the first turn that ends at it or later; what is not trained counts for
    # nothing, and gets the value too. After the last turn of the group comes no other.
    turn_of = np.searchsorted(ends, np.arange(offsets[-1]))
    advantages[tokens] = np.append(found, 0.0)[turn_of]


def _check_used(
    batch: RolloutBatch, objective: ObjectiveConfig, advantages: NDArray[np.float64]
) -> None:
    """Refuse advantages that the objective would pass over, or could not tell apart."""
    for group in range(batch.num_groups):
        for response in batch.responses_of(group):
            tokens = batch.tokens_of(response)
            values = advantages[tokens]
            if np.isnan(values[0]):
                continue
            where = f"{batch.sources[group]}: responses[{response - batch.group_offsets[group]}]"
            if objective.name == "supervised":
                raise ValueError(
                    f"{where}: it has advantages or turn_rewards, which objective.name: supervised "
                    "does not use; leave them out, or set another objective"
                )
            if objective.name != "gspo":
                continue
            if batch.loss_mask is not None:
                values = values[batch.loss_mask[tokens]]
            if values.min() != values.max():
                raise ValueError(
                    f"{where}: its tokens have different advantages, but objective.name: gspo "
                    "weighs a response as a whole; give one reward for each response, or set an "
                    "objective with a ratio for each token, such as grpo"
                )
