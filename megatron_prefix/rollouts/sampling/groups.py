"""Rollout batches of prompts and the responses to them, made on rank 0.

A batch is made by a generator, which asks for responses (see `sampler`) and does not know who
gives them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_prefix.rollouts.engine import ServerError
from megatron_prefix.rollouts.prompts import Prompt, PromptSource
from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup
from megatron_prefix.rollouts.rewards import RewardFunction, close_reward, reward_batch
from megatron_prefix.rollouts.routes import RouteReader, share_prompt_of_first
from megatron_prefix.rollouts.sampling.agent import AgentLoop
from megatron_prefix.rollouts.sampling.sampler import (
    Answers,
    Asking,
    Response,
    SamplingSpec,
    Tally,
    Wanted,
)
from megatron_prefix.rollouts.stream import position_kept
from megatron_prefix.rollouts.validation import Limits, validate_group

_ATTEMPTS = 5
"""Rounds in which a batch's missing responses or groups are asked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """A rollout batch, and where the prompts stand after it."""

    rollouts: RolloutBatch | None
    """None on other ranks than 0."""
    num_groups: int
    version: int | None
    """Of the policy; None where it is the trained model, or not known."""
    source_state: dict[str, Any]
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class GroupSpec:
    """What makes a group of a prompt."""

    sampling: SamplingSpec
    limits: Limits
    """Of the model."""
    uses_logprobs: bool = False
    """Whether the responses' log-probabilities become the old ones. Without them the trainer
    computes its own, by the code that also computes the loss."""
    partial_groups: Literal["resample", "drop", "keep"] = "drop"
    """Of a group that has not all of its responses."""
    turn_rewards: bool = False
    """Whether rewards of an environment are those of turns."""
    routes: RouteReader | None = None
    """What becomes of the responses' routes; None: there are none."""
    asked: str = "the model"
    """What errors call whoever is asked."""


@dataclass(eq=False)
class GroupMaker:
    """Asks for a group of responses to each prompt, checks and rewards them."""

    spec: GroupSpec
    reward: RewardFunction | None
    """Of each response; None where an environment gives rewards."""
    agent: AgentLoop | None = None
    """For responses of several turns; None: of one."""

    def batch(
        self, source: PromptSource, num_groups: int, *, step: int, version: int | None
    ) -> Asking[Batch]:
        """The groups of the next prompts, by the policy of a version. A step has randomness of its
        own. The prompts' position is put back after an error.

        Raises:
            EndOfRollouts: fewer prompts are left.
            ServerError: whoever is asked keeps giving what cannot be used.
            ValueError: a prompt, response or reward that is wrong, naming it.
        """
        tally = Tally()
        groups: list[RolloutGroup] = []
        with position_kept(source):
            for attempt in range(_ATTEMPTS):
                prompts = source.take(num_groups - len(groups))
                found = yield from self._responses(prompts, tally, step, attempt)
                groups += [
                    self.group(prompt, responses, version)
                    for prompt, responses in zip(prompts, found, strict=True)
                    if self._is_enough(len(responses))
                ]
                tally.dropped_groups += sum(not self._is_enough(len(of_one)) for of_one in found)
                if len(groups) == num_groups:
                    return Batch(
                        rollouts=self.rewarded(groups),
                        num_groups=num_groups,
                        version=version,
                        source_state=source.state_dict(),
                        metrics={**tally.metrics(), **self._agent_metrics(tally, groups)},
                    )
            raise ServerError(
                f"{self.spec.asked}: in {_ATTEMPTS} rounds only {len(groups)} of "
                f"{num_groups} groups could be used (server.partial_groups: "
                f"{self.spec.partial_groups}); {tally.rejected} responses failed: "
                f"{'; '.join(tally.reasons)}"
            )

    def answers(
        self, wanted: list[Wanted], tally: Tally
    ) -> Generator[list[Wanted], Answers, list[list[Response]]]:
        """Responses to each of the wanted, of one turn or of several."""
        if self.agent is not None:
            return (yield from self.agent.play(wanted, tally))
        answers = yield wanted
        for responses in answers.responses:
            tally.count(responses)
        tally.identical_groups += answers.tally.identical_groups
        tally.add_failures(answers.tally)
        return answers.responses

    def group(
        self, prompt: Prompt, responses: Sequence[Response], version: int | None
    ) -> RolloutGroup:
        """The group of a prompt, which can be trained on; its rewards are the environment's, or
        else 0."""
        logprobs = [response.logprobs for response in responses]
        rewards = [response.turn_rewards or () for response in responses]
        masks = [response.loss_mask for response in responses]
        routes = None
        if self.spec.routes is not None:
            routes = [response.routes for response in responses]
            assert not any(of_response is None for of_response in routes)
            if self.spec.routes.prompts_as_first:
                share_prompt_of_first(routes, len(prompt.tokens))
        has_logprobs = self.spec.uses_logprobs and all(found is not None for found in logprobs)
        group = RolloutGroup(
            prompt=prompt.tokens,
            responses=tuple(response.tokens for response in responses),
            rewards=tuple(map(float, map(sum, rewards))),
            turn_rewards=rewards if self.spec.turn_rewards else None,
            loss_mask=None if any(mask is None for mask in masks) else masks,
            old_logprobs=tuple(logprobs) if has_logprobs else None,
            routes=routes,
            finished=tuple(response.finished for response in responses),
            answer=prompt.answer,
            record=prompt.record,
            policy_version=version,
            source=prompt.source,
        )
        validate_group(group, self.spec.limits)
        return group

    def rewarded(self, groups: Sequence[RolloutGroup]) -> RolloutBatch:
        """A batch of groups with their rewards."""
        if any(group.old_logprobs is None for group in groups):
            # An optimizer step has them of all its responses or of none.
            groups = [dataclasses.replace(group, old_logprobs=None) for group in groups]
        batch = RolloutBatch.from_groups(groups)
        return batch if self.reward is None else reward_batch(self.reward, batch)

    def close(self) -> None:
        """End the processes of the reward and the environment."""
        close_reward(self.reward)
        if self.agent is not None:
            self.agent.close()

    def _responses(
        self, prompts: list[Prompt], tally: Tally, step: int, attempt: int
    ) -> Generator[list[Wanted], Answers, list[list[Response]]]:
        """The responses to each prompt, missing ones asked for again where that is configured."""
        size = self.spec.sampling.group_size
        found: list[list[Response]] = [[] for _ in prompts]
        for again in range(_ATTEMPTS if self.spec.partial_groups == "resample" else 1):
            missing = [i for i, responses in enumerate(found) if len(responses) < size]
            if not missing:
                break
            wanted = [
                Wanted(
                    prompt=prompts[i],
                    count=size - len(found[i]),
                    seed=self._seed(step, i, _ATTEMPTS * attempt + again),
                )
                for i in missing
            ]
            answers = yield from self.answers(wanted, tally)
            for i, responses in zip(missing, answers, strict=True):
                found[i] += responses
            if again == 0:
                tally.partial_groups += sum(len(responses) < size for responses in found)
        return found

    def _seed(self, step: int, prompt: int, attempt: int) -> int:
        """Of a group's first request; those of its later ones count on from it."""
        entropy = [self.spec.sampling.seed, step, prompt, attempt]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0]) % (1 << 31)

    def _is_enough(self, count: int) -> bool:
        """Whether so many responses make a group."""
        return count == self.spec.sampling.group_size or (
            self.spec.partial_groups == "keep" and count >= 2
        )

    def _agent_metrics(self, tally: Tally, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        if self.agent is None:
            return {}
        finished = [flag for group in groups for flag in group.finished or ()]
        return {
            "environment_failures": float(tally.environment_failures),
            "turns": tally.turns / max(1, len(finished)),
            "unfinished_responses": float(len(finished) - sum(finished)),
        }
