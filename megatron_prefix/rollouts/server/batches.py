"""Rollout batches from a server, sampled on rank 0 and in a thread of its own."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_prefix.rollouts.prompts import Prompt, PromptSource
from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup
from megatron_prefix.rollouts.rewards import RewardFunction, reward_batch
from megatron_prefix.rollouts.server.agent import AskedAgent
from megatron_prefix.rollouts.server.answers import OtherWeights, Sample
from megatron_prefix.rollouts.server.asking import Asker, Tally, Wanted, request_seed
from megatron_prefix.rollouts.server.client import ServerClient, ServerError
from megatron_prefix.rollouts.validation import validate_group

logger = logging.getLogger(__name__)

_ATTEMPTS = 5
"""Rounds in which a batch's missing responses or groups are asked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """A rollout batch, and where the prompts stand after it."""

    rollouts: RolloutBatch | None
    """None on other ranks than 0."""
    num_groups: int
    version: int | None
    """Of the policy; None where the server's weights are its own affair."""
    source_state: dict[str, Any]
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class GroupSpec:
    """What makes a group of a prompt."""

    group_size: int
    vocab_size: int
    max_sequence_length: int
    uses_logprobs: bool
    """Whether the server's log-probabilities become the old ones."""
    partial_groups: Literal["resample", "drop", "keep"]
    seed: int
    turn_rewards: bool = False
    """Whether rewards of an environment are those of turns."""


class BatchSampler:
    """Samples rollout batches, on rank 0 and in a thread of its own."""

    def __init__(
        self,
        asker: Asker | AskedAgent,
        client: ServerClient,
        source: PromptSource,
        reward: RewardFunction | None,
        spec: GroupSpec,
        *,
        load_again: Callable[[], None] | None,
    ) -> None:
        """Nothing is asked yet.

        Args:
            asker: of the server.
            client: what the asker asks through.
            source: of the prompts.
            reward: of each response; None where an environment gives rewards.
            spec: of the groups.
            load_again: loads the current weights into a server that may have been started anew;
                None where it would have them.
        """
        self._asker = asker
        self._client = client
        self._source = source
        self._reward = reward
        self._spec = spec
        self._load_again = load_again
        self._retries_told = 0

    def sample(self, num_groups: int, *, step: int, version: int | None) -> Batch:
        """The groups of the next prompts. The prompts' position is put back after an error.

        Raises:
            EndOfRollouts: fewer prompts are left.
            ServerError: the server is down, refuses, or keeps giving what cannot be used.
            ValueError: a prompt or reward that is wrong, naming it.
        """
        before = self._source.state_dict()
        try:
            return self._sample(num_groups, step=step, version=version)
        except BaseException:
            self._source.load_state_dict(before)
            raise

    def _sample(self, num_groups: int, *, step: int, version: int | None) -> Batch:
        tally = Tally()
        groups: list[RolloutGroup] = []
        partial = dropped = attempt = 0
        while len(groups) < num_groups:
            if attempt == _ATTEMPTS:
                raise ServerError(
                    f"{self._client.url}: in {_ATTEMPTS} rounds only {len(groups)} of {num_groups} "
                    f"groups could be used (server.partial_groups: {self._spec.partial_groups}); "
                    f"{tally.rejected} responses failed: {'; '.join(tally.reasons)}"
                )
            prompts = self._source.take(num_groups - len(groups))
            for prompt, samples, is_partial in self._responses(prompts, tally, step, attempt):
                partial += is_partial
                if len(samples) == self._spec.group_size or (
                    self._spec.partial_groups == "keep" and len(samples) >= 2
                ):
                    groups.append(self._group(prompt, samples, version))
                else:
                    dropped += 1
            attempt += 1
        if any(group.old_logprobs is None for group in groups):
            # An optimizer step has them of all its responses or of none.
            groups = [dataclasses.replace(group, old_logprobs=None) for group in groups]
        rollouts = RolloutBatch.from_groups(groups)
        if self._reward is not None:
            rollouts = reward_batch(self._reward, rollouts)
        # Those of the weights' hand-over count too.
        retries = self._client.retries - self._retries_told
        self._retries_told += retries
        return Batch(
            rollouts=rollouts,
            num_groups=num_groups,
            version=version,
            source_state=self._source.state_dict(),
            metrics={
                "partial_groups": float(partial),
                "dropped_groups": float(dropped),
                "rejected_responses": float(tally.rejected),
                "identical_groups": float(tally.identical_groups),
                "tokens_from_text": tally.from_text / max(1, tally.samples),
                "server_retries": float(retries),
                **self._agent_metrics(tally, groups),
            },
        )

    def _agent_metrics(self, tally: Tally, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        if self._reward is not None:
            return {}
        finished = [flag for group in groups for flag in group.finished or ()]
        return {
            "environment_failures": float(tally.environment_failures),
            "turns": tally.turns / max(1, len(finished)),
            "unfinished_responses": float(len(finished) - sum(finished)),
        }

    def _responses(
        self, prompts: list[Prompt], tally: Tally, step: int, attempt: int
    ) -> list[tuple[Prompt, list[Sample], bool]]:
        """Each prompt's samples, and whether some of them were missing at first."""
        size = self._spec.group_size
        samples: list[list[Sample]] = [[] for _ in prompts]
        is_partial = [False] * len(prompts)
        rounds = _ATTEMPTS if self._spec.partial_groups == "resample" else 1
        for r in range(rounds):
            missing = [i for i, found in enumerate(samples) if len(found) < size]
            if not missing:
                break
            wanted = [
                Wanted(
                    prompt=prompts[i],
                    count=size - len(samples[i]),
                    seed=request_seed(
                        seed=self._spec.seed, step=step, prompt=i, attempt=_ATTEMPTS * attempt + r
                    ),
                )
                for i in missing
            ]
            for i, found in zip(missing, self._ask(wanted, tally), strict=True):
                samples[i] += found
                is_partial[i] |= len(samples[i]) < size
        return list(zip(prompts, samples, is_partial, strict=True))

    def _ask(self, wanted: list[Wanted], tally: Tally) -> list[list[Sample]]:
        """Answers that are all of the current weights, though the server may come back with others.

        A server that was away has been started anew, for all that is known.
        """
        load_again = self._load_again
        if load_again is None:
            return self._asker.ask(wanted, tally)
        has_differed = False
        while True:
            outages = self._client.outages
            try:
                found = self._asker.ask(wanted, tally)
                if self._client.outages == outages:
                    return found
            except OtherWeights:
                # Once, where no outage explains it: a second time somebody else loads them.
                if self._client.outages == outages:
                    if has_differed:
                        raise
                    has_differed = True
            logger.warning(
                "%s: seems to have been started anew; loading the weights and asking again",
                self._client.url,
            )
            load_again()

    def _group(self, prompt: Prompt, samples: list[Sample], version: int | None) -> RolloutGroup:
        with_logprobs = self._spec.uses_logprobs and all(s.logprobs is not None for s in samples)
        rewards = [sample.turn_rewards or () for sample in samples]
        masks = [sample.loss_mask for sample in samples]
        group = RolloutGroup(
            prompt=prompt.tokens,
            responses=tuple(sample.tokens for sample in samples),
            rewards=tuple(map(float, map(sum, rewards))),
            turn_rewards=rewards if self._spec.turn_rewards else None,
            loss_mask=None if any(mask is None for mask in masks) else masks,
            old_logprobs=tuple(s.logprobs for s in samples) if with_logprobs else None,
            finished=tuple(sample.finished for sample in samples),
            answer=prompt.answer,
            record=prompt.record,
            policy_version=version,
            source=prompt.source,
        )
        validate_group(
            group,
            vocab_size=self._spec.vocab_size,
            max_positions=self._spec.max_sequence_length,
        )
        return group
