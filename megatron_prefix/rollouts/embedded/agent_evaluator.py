"""How good the model is at dialogues with an environment whose prompts it is never trained on."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from megatron_prefix.distributed.rank_results import on_rank_0, rank_0_alone
from megatron_prefix.rollouts.embedded.batch import SamplingOptions
from megatron_prefix.rollouts.embedded.evaluator import STEP, EvaluationResult
from megatron_prefix.rollouts.embedded.sampler import SampledResponse, Sampler
from megatron_prefix.rollouts.engine import ENGINE_ERRORS
from megatron_prefix.rollouts.prompts import Prompt
from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup
from megatron_prefix.rollouts.server.agent import AgentLoop, Play
from megatron_prefix.rollouts.server.answers import Sample
from megatron_prefix.rollouts.server.asking import Tally, Wanted
from megatron_prefix.rollouts.text.tokenizer import Tokens


class AgentEvaluator:
    """Plays one dialogue for each of a fixed list of prompts, and averages their rewards.

    The model itself samples, not the server. All ranks sample; rank 0 alone has the environment. A
    dialogue whose environment fails counts with the reward that is set for it, else with 0.
    """

    last: EvaluationResult | None = None
    """What the last `evaluate` found."""
    batch: RolloutBatch | None = None
    """The dialogues of the last `evaluate`, on rank 0."""

    def __init__(
        self,
        sampler: Sampler,
        loop: AgentLoop | None,
        prompts: Sequence[Prompt],
        *,
        options: SamplingOptions,
        seed: int,
        data_sets: Sequence[str] = (),
    ) -> None:
        """Nothing is sampled yet.

        Args:
            sampler: of the model.
            loop: of the dialogues, on rank 0; None elsewhere.
            prompts: at least one, each of a chat.
            options: of the sampling of a turn.
            seed: of the sampling; all evaluations draw the same random numbers.
            data_sets: for each prompt the name of its data set; empty where they are of one.
        """
        assert prompts
        self._sampler = sampler
        self._loop = loop
        self._prompts = prompts
        self._options = options
        self._seed = seed
        self._data_sets = tuple(data_sets)
        self._metrics: dict[str, float] = {}

    def evaluate(self) -> float:
        """The mean reward of the model as it is now, the same on every rank. Collective.

        Raises:
            ServerError: a prompt that is no chat.
        """
        dialogues = _Dialogues(self._loop, self._prompts, self._data_sets)
        sampled: list[list[SampledResponse]] | None = None
        turn = 0
        while True:
            go_on = functools.partial(dialogues.go_on, sampled, self._options)
            asked = on_rank_0(go_on, errors=ENGINE_ERRORS)
            if asked is None:
                break
            sampled = self._sampler.sample_with_logprobs(
                asked, self._options, num_responses=1, seed=self._seed, step=STEP + turn
            )
            turn += 1
        self.last, self._metrics = on_rank_0(dialogues.result)
        self.batch = rank_0_alone(dialogues.batch)
        return self.last.mean

    def metrics(self) -> dict[str, float]:
        """What happened in the dialogues of the last evaluation."""
        return self._metrics


class _Dialogues:
    """The dialogues of one evaluation, on rank 0."""

    def __init__(
        self, loop: AgentLoop | None, prompts: Sequence[Prompt], data_sets: tuple[str, ...]
    ) -> None:
        self._tally = Tally()
        self._prompts, self._data_sets = prompts, data_sets
        self._responses: list[list[Sample]] = []
        self._play: Play | None = None
        if loop is not None:
            wanted = [Wanted(prompt=prompt, count=1, seed=0) for prompt in prompts]
            self._play = loop.play(wanted, self._tally)

    def go_on(
        self, sampled: list[list[SampledResponse]] | None, options: SamplingOptions
    ) -> list[Tokens] | None:
        """Tokens to sample a turn behind; None where all dialogues have ended.

        Args:
            sampled: the turns that were asked for last; None at first.
            options: that they were sampled with.
        """
        assert self._play is not None
        try:
            if sampled is None:
                turns = next(self._play)
            else:
                turns = self._play.send([[_sample(r, options) for r in found] for found in sampled])
        except StopIteration as ended:
            self._responses = ended.value
            return None
        return [turn.prompt.tokens for turn in turns]

    def batch(self) -> RolloutBatch | None:
        """The dialogues that have ended; None where none has."""
        groups = [
            RolloutGroup(
                prompt=prompt.tokens,
                responses=tuple(sample.tokens for sample in samples),
                rewards=tuple(sum(sample.turn_rewards or ()) for sample in samples),
                finished=tuple(sample.finished for sample in samples),
                answer=prompt.answer,
                source=prompt.source,
            )
            for prompt, samples in zip(self._prompts, self._responses, strict=True)
            if samples
        ]
        return RolloutBatch.from_groups(groups) if groups else None

    def result(self) -> tuple[EvaluationResult, dict[str, float]]:
        """The rewards, and metrics."""
        rewards = [
            float(sum(reward for sample in samples for reward in sample.turn_rewards or ()))
            for samples in self._responses
        ]
        ended = sum(map(len, self._responses))
        metrics = {
            "eval_turns": self._tally.turns / max(1, ended),
            "eval_environment_failures": float(self._tally.environment_failures),
        }
        found = EvaluationResult(rewards=tuple(rewards), data_sets=self._data_sets)
        return found, {**found.metrics(), **metrics}


def _sample(response: SampledResponse, options: SamplingOptions) -> Sample:
    return Sample(
        tokens=response.tokens,
        logprobs=response.logprobs.astype(np.float32),
        finished=bool(response.tokens[-1] in options.stop_tokens),
        from_text=False,
    )
