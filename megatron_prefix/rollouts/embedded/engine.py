"""The `embedded` engine: rollouts from the very model that is being trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_prefix.distributed.rank_results import rank_0_alone
from megatron_prefix.rollouts.embedded.batch import SamplingOptions
from megatron_prefix.rollouts.embedded.sampler import Sampler
from megatron_prefix.rollouts.prompts import Prompt, PromptSource
from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup, Tokens
from megatron_prefix.rollouts.rewards import RewardFunction, close_reward, reward_batch
from megatron_prefix.rollouts.validation import validate_batch


class EmbeddedEngine:
    """Streams prompts, samples a group of responses to each, and rewards them.

    Every rank reads all prompts and takes part in the sampling; rank 0 gets the groups and rewards
    them. They carry no old log-probabilities: where the trainer needs these it computes them by the
    code that also computes the loss, so that the first ratio of new to old is exactly one.
    """

    def __init__(
        self,
        sampler: Sampler,
        source: PromptSource,
        *,
        vocab_size: int,
        max_sequence_length: int,
        group_size: int,
        options: SamplingOptions,
        reward: RewardFunction,
        seed: int,
    ) -> None:
        """Nothing is read yet.

        Args:
            sampler: of the model.
            source: of the prompts.
            vocab_size: token ids lie in [0, vocab_size).
            max_sequence_length: tokens of a prompt and a response at most.
            group_size: responses to each prompt.
            options: of the sampling.
            reward: of each response.
            seed: of the sampling; the same seed and step give the same responses.
        """
        self._sampler = sampler
        self._vocab_size = vocab_size
        self._max_sequence_length = max_sequence_length
        self._group_size = group_size
        self._options = options
        self._reward = reward
        self._seed = seed
        self._source = source

    def next_rollouts(self, num_groups: int, *, step: int) -> RolloutBatch | None:
        """Sample the responses to the next `num_groups` prompts. Collective.

        Args:
            num_groups: how many.
            step: rollout batches trained on so far; each has randomness of its own.

        Raises:
            EndOfRollouts: fewer prompts are left in the last epoch.
            ValueError: a prompt that is wrong, or a reward that could not be computed, naming the
                file and the line or row.
        """
        prompts = self._source.take(num_groups)
        batch = sample_rollouts(
            self._sampler,
            prompts,
            self._options,
            group_size=self._group_size,
            reward=self._reward,
            seed=self._seed,
            step=step,
        )
        if batch is not None:
            validate_batch(
                batch, vocab_size=self._vocab_size, max_positions=self._max_sequence_length
            )
        return batch

    def metrics(self) -> dict[str, float]:
        """Nothing: the trainer's own metrics say all."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Where the engine stands in its prompts; the randomness depends on the step alone."""
        return self._source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: the files have changed since.
        """
        self._source.load_state_dict(state)

    def close(self) -> None:
        """Close the file that is open, and end the reward's processes."""
        self._source.close()
        close_reward(self._reward)


def sample_rollouts(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    options: SamplingOptions,
    *,
    group_size: int,
    reward: RewardFunction,
    seed: int,
    step: int,
) -> RolloutBatch | None:
    """Responses to prompts with their rewards, on rank 0; elsewhere None. Collective.

    Raises:
        ValueError: see `Sampler.sample_with_logprobs` and `compute_rewards`, on every rank.
    """
    sampled = sampler.sample_with_logprobs(
        [prompt.tokens for prompt in prompts],
        options,
        num_responses=group_size,
        seed=seed,
        step=step,
        sources=[prompt.source for prompt in prompts],
    )

    def rewarded() -> RolloutBatch:
        assert sampled is not None
        groups = [
            _group(prompt, [response.tokens for response in found], options)
            for prompt, found in zip(prompts, sampled, strict=True)
        ]
        return reward_batch(reward, RolloutBatch.from_groups(groups))

    return rank_0_alone(rewarded)


def _group(prompt: Prompt, responses: Sequence[Tokens], options: SamplingOptions) -> RolloutGroup:
    """The group of a prompt; its rewards are 0."""
    return RolloutGroup(
        prompt=prompt.tokens,
        responses=responses,
        rewards=(0.0,) * len(responses),
        finished=tuple(bool(response[-1] in options.stop_tokens) for response in responses),
        answer=prompt.answer,
        record=prompt.record,
        source=prompt.source,
    )
