"""How good the model is on prompts that it is never trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_prefix.distributed.rank_results import on_rank_0
from megatron_prefix.rollouts.embedded.batch import SamplingOptions
from megatron_prefix.rollouts.embedded.engine import sample_rollouts
from megatron_prefix.rollouts.embedded.sampler import Sampler
from megatron_prefix.rollouts.prompts import Prompt
from megatron_prefix.rollouts.records import RolloutBatch
from megatron_prefix.rollouts.rewards import RewardFunction

STEP = 1 << 63
"""Keys the randomness of evaluations: no step of training, and the same for all of them."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The rewards of one evaluation."""

    rewards: tuple[float, ...]
    """One for each prompt."""

    @property
    def mean(self) -> float:
        """The mean reward."""
        return sum(self.rewards) / len(self.rewards)

    @property
    def num_prompts(self) -> int:
        """Prompts that were evaluated on."""
        return len(self.rewards)

    @property
    def num_correct(self) -> int:
        """Responses whose reward is at least 1, for rewards that say right or wrong."""
        return sum(reward >= 1 for reward in self.rewards)


class Evaluator:
    """Samples one response to each of a fixed list of prompts and averages their rewards.

    Nothing of the training changes by it, its random state and its place in the data included.
    """

    last: EvaluationResult | None = None
    """What the last `evaluate` found."""
    batch: RolloutBatch | None = None
    """The responses of the last `evaluate`, on rank 0."""

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[Prompt],
        *,
        options: SamplingOptions,
        reward: RewardFunction,
        seed: int,
    ) -> None:
        """Nothing is sampled yet.

        Args:
            sampler: of the model.
            prompts: at least one.
            options: of the sampling.
            reward: of each response.
            seed: of the sampling; all evaluations draw the same random numbers.
        """
        assert prompts
        self._sampler = sampler
        self._prompts = prompts
        self._options = options
        self._reward = reward
        self._seed = seed

    def evaluate(self) -> float:
        """The mean reward of the model as it is now, the same on every rank. Collective.

        Raises:
            ValueError: a reward could not be computed, naming the prompt's source.
        """
        self.batch = sample_rollouts(
            self._sampler,
            self._prompts,
            self._options,
            group_size=1,
            reward=self._reward,
            seed=self._seed,
            step=STEP,
        )
        self.last = on_rank_0(lambda: _result(self.batch))
        return self.last.mean

    def metrics(self) -> dict[str, float]:
        """Nothing beside the mean reward."""
        return {}


def _result(batch: RolloutBatch | None) -> EvaluationResult:
    assert batch is not None
    return EvaluationResult(rewards=tuple(batch.rewards.tolist()))
