"""How good the model is on prompts that it is never trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.rollouts.embedded.sampler import EmbeddedSampler
from megatron_prefix.rollouts.prompts import Prompt
from megatron_prefix.rollouts.records import RolloutBatch
from megatron_prefix.rollouts.sampling.groups import GroupMaker
from megatron_prefix.rollouts.sampling.sampler import Asking, Tally, Wanted, answered_by_ranks

STEP = 1 << 63
"""Keys the randomness of evaluations: no step of training, and the same for all of them."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The rewards of one evaluation."""

    rewards: tuple[float, ...]
    """One for each response, prompt by prompt."""
    responses_per_prompt: int = 1
    data_sets: tuple[str, ...] = ()
    """For each prompt the name of its data set; empty where prompts are of one."""
    of_agent: Mapping[str, float] = field(default_factory=dict)
    """Other metrics."""
    rollouts: RolloutBatch | None = None
    """None on other ranks than 0, and where no dialogue came to an end."""

    @property
    def mean(self) -> float:
        """The mean reward."""
        return sum(self.rewards) / len(self.rewards)

    @property
    def num_prompts(self) -> int:
        """Prompts that were evaluated on."""
        return len(self.rewards) // self.responses_per_prompt

    @property
    def num_correct(self) -> int:
        """Responses whose reward is at least 1, for rewards that say right or wrong."""
        return sum(reward >= 1 for reward in self.rewards)

    def metrics(self) -> dict[str, float]:
        """The mean reward of each data set, and pass@k of all prompts and of each data set."""
        rewards = np.array(self.rewards).reshape(self.num_prompts, self.responses_per_prompt)
        names = np.array(self.data_sets)
        parts = {"": rewards}
        parts |= {f"/{name}": rewards[names == name] for name in dict.fromkeys(self.data_sets)}
        found = {f"eval{end}": float(part.mean()) for end, part in parts.items() if end}
        for k in _counts(self.responses_per_prompt):
            for end, part in parts.items():
                found[f"eval_pass_at_{k}{end}"] = pass_at_k(part >= 1, k)
        return {**found, **self.of_agent}


def pass_at_k(correct: NDArray[np.bool_], k: int) -> float:
    """The chance that of k responses to a prompt at least one is right; mean over prompts.

    Without bias, from n >= k responses of which c are right: 1 - C(n - c, k) / C(n, k) (Chen et
    al., arXiv 2107.03374, equation 1). `correct` is [prompts, n].
    """
    n = correct.shape[1]
    wrong = n - correct.sum(axis=1)
    return float(np.mean([1 - math.comb(int(w), k) / math.comb(n, k) for w in wrong]))


def _counts(responses: int) -> list[int]:
    """The k of pass@k: powers of two and all responses; none where there is one response."""
    if responses == 1:
        return []
    return sorted({2**i for i in range(responses.bit_length()) if 2**i <= responses} | {responses})


@dataclass(eq=False)
class Evaluator:
    """Samples responses to each of a fixed list of prompts and averages their rewards.

    Nothing of the training changes by it, its random state and its place in the data included. With
    an agent the trained model itself plays the dialogues, not a server; one that is left out since
    its environment failed counts with 0.
    """

    sampler: EmbeddedSampler
    """All evaluations draw the same random numbers."""
    maker: GroupMaker | None
    """Of the groups, on rank 0; None elsewhere."""
    prompts: Sequence[Prompt] = ()
    """On rank 0 at least one."""
    data_sets: Sequence[str] = field(default=(), kw_only=True)
    """For each prompt the name of its data set; empty where they are of one."""
    last: EvaluationResult | None = field(default=None, init=False)
    """What the last `evaluate` found."""

    @property
    def batch(self) -> RolloutBatch | None:
        """The responses of the last `evaluate`, on rank 0."""
        return None if self.last is None else self.last.rollouts

    def evaluate(self) -> float:
        """The mean reward of the model as it is now, the same on every rank. Collective."""
        asking = None if self.maker is None else self._evaluated(self.maker)
        self.last = answered_by_ranks(asking, self.sampler, step=STEP)
        return self.last.mean

    def close(self) -> None:
        """End the processes of the reward and the environment."""
        if self.maker is not None:
            self.maker.close()

    def metrics(self) -> dict[str, float]:
        """What there is beside the mean reward of the last `evaluate`."""
        return {} if self.last is None else self.last.metrics()

    def _evaluated(self, maker: GroupMaker) -> Asking[EvaluationResult]:
        tally = Tally()
        count = maker.spec.sampling.group_size
        wanted = [Wanted(prompt=prompt, count=count) for prompt in self.prompts]
        answers = yield from maker.answers(wanted, tally)
        groups = [
            maker.group(prompt, responses, None)
            for prompt, responses in zip(self.prompts, answers, strict=True)
            if responses
        ]
        rollouts = maker.rewarded(groups) if groups else None
        came = np.repeat([len(responses) > 0 for responses in answers], count)
        rewards = np.zeros(len(came))
        if rollouts is not None:
            rewards[came] = rollouts.rewards
        of_agent = {}
        if maker.agent is not None:
            of_agent["eval_turns"] = tally.turns / max(1, int(came.sum()))
            of_agent["eval_environment_failures"] = float(tally.environment_failures)
        return EvaluationResult(
            rewards=tuple(rewards.tolist()),
            responses_per_prompt=count,
            data_sets=tuple(self.data_sets),
            of_agent=of_agent,
            rollouts=rollouts,
        )
