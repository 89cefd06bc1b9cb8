"""The `openai` engine: rank 0 asks the server; all ranks hand over the weights."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist

from megatron_prefix.config import ServerConfig, WeightsConfig
from megatron_prefix.distributed.rank_results import from_rank_0
from megatron_prefix.rollouts.engine import ENGINE_ERRORS
from megatron_prefix.rollouts.hf.folders import PolicyFolders
from megatron_prefix.rollouts.prompts import Prompt, PromptSource
from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup
from megatron_prefix.rollouts.rewards import RewardFunction, close_reward, reward_batch
from megatron_prefix.rollouts.server.answers import OtherWeights, Sample
from megatron_prefix.rollouts.server.asking import Asker, Tally, Wanted, request_seed
from megatron_prefix.rollouts.server.client import ServerClient, ServerError
from megatron_prefix.rollouts.server.loading import WeightLoader
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


class BatchSampler:
    """Samples rollout batches, on rank 0 and in a thread of its own."""

    def __init__(
        self,
        asker: Asker,
        client: ServerClient,
        source: PromptSource,
        reward: RewardFunction,
        spec: GroupSpec,
        *,
        load_again: Callable[[], None] | None,
    ) -> None:
        """Nothing is asked yet.

        Args:
            asker: of the server.
            client: what the asker asks through.
            source: of the prompts.
            reward: of each response.
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
        rollouts = reward_batch(self._reward, RolloutBatch.from_groups(groups))
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
                "tokens_from_text": tally.from_text / max(1, tally.samples),
                "server_retries": float(retries),
            },
        )

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
        group = RolloutGroup(
            prompt=prompt.tokens,
            responses=tuple(sample.tokens for sample in samples),
            rewards=(0.0,) * len(samples),
            old_logprobs=tuple(s.logprobs for s in samples) if with_logprobs else None,
            finished=tuple(sample.finished for sample in samples),
            answer=prompt.answer,
            policy_version=version,
            source=prompt.source,
        )
        validate_group(
            group,
            vocab_size=self._spec.vocab_size,
            max_positions=self._spec.max_sequence_length,
        )
        return group


class OpenAIEngine:
    """Streams prompts, has a server sample a group of responses to each, and rewards them.

    Before a batch is sampled the weights are handed over, where that is due. With `prefetch` the
    next batch is sampled while this one is trained on, with the weights there were before it.
    """

    def __init__(
        self,
        asker: Asker,
        client: ServerClient,
        source: PromptSource,
        reward: RewardFunction,
        spec: GroupSpec,
        *,
        server: ServerConfig,
        weights: WeightsConfig,
        folders: PolicyFolders,
        loader: WeightLoader | None,
    ) -> None:
        """Nothing is asked yet. Only rank 0 ever asks; the others need the same arguments.

        Args:
            asker: of the server.
            client: of the server.
            source: of the prompts.
            reward: of each response.
            spec: of the groups.
            server: its configuration.
            weights: when they are handed over, and how old groups may be.
            folders: where they are handed over.
            loader: has the server load them; None leaves the server's weights alone.
        """
        self._asker = asker
        self._client = client
        self._source = source
        self._reward = reward
        self._server = server
        self._weights = weights
        self._folders = folders
        self._loader = loader
        self._version: int | None = None
        self._has_checked_model = False
        self._sampler = BatchSampler(
            asker,
            client,
            source,
            reward,
            spec,
            load_again=self._load if loader is not None and loader.forgets else None,
        )
        self._is_main = dist.get_rank() == 0
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: Future[Batch] | None = None
        self._has_under_way = False
        self._state = source.state_dict()
        self._metrics: dict[str, float] = {}

    def next_rollouts(self, num_groups: int, *, step: int) -> RolloutBatch | None:
        """The groups of the next `num_groups` prompts. Collective.

        Args:
            num_groups: how many.
            step: rollout batches trained on so far, which is the weights' version.

        Raises:
            EndOfRollouts: fewer prompts are left in the last epoch.
            ServerError: the server stayed away longer than its patience, refuses, or serves
                another model.
            ValueError: a prompt or reward that is wrong, naming the record.
        """
        batch: Batch | None = None
        stale = 0
        if self._has_under_way:
            batch = self._collect()
            if batch.version is not None and step - batch.version > self._weights.max_staleness:
                logger.warning(
                    "%d groups of version %d are older than weights.max_staleness: %d allows at "
                    "step %d; they are sampled again",
                    *(batch.num_groups, batch.version, self._weights.max_staleness, step),
                )
                stale = batch.num_groups
                self._source.load_state_dict(self._state)
                batch = None
        self._hand_over(step)
        if batch is None:
            self._start(num_groups, step)
            batch = self._collect()
        self._state = batch.source_state
        if self._server.prefetch:
            self._start(num_groups, step + 1)
        self._metrics = {**batch.metrics, "stale_groups": float(stale)}
        if batch.version is not None:
            self._metrics["policy_version"] = float(batch.version)
            self._metrics["staleness"] = float(step - batch.version)
        return batch.rollouts

    def metrics(self) -> dict[str, float]:
        """Of the last batch: its policy's version, its age, and what went wrong on the way."""
        return self._metrics

    def state_dict(self) -> dict[str, Any]:
        """Where the engine stands in its prompts; a batch under way is sampled again."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: the files have changed since.
        """
        self._source.load_state_dict(state)
        self._state = self._source.state_dict()

    def close(self) -> None:
        """Give up what is under way, and end the reward's processes."""
        self._client.close()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
        self._has_under_way = False
        self._source.close()
        close_reward(self._reward)

    def _start(self, num_groups: int, step: int) -> None:
        self._has_under_way = True
        if self._is_main:
            sample = functools.partial(
                self._sampler.sample, num_groups, step=step, version=self._version
            )
            self._under_way = self._run(sample)

    def _collect(self) -> Batch:
        self._has_under_way = False
        under_way, self._under_way = self._under_way, None
        return from_rank_0(
            under_way,
            tell=lambda batch: dataclasses.replace(batch, rollouts=None),
            errors=ENGINE_ERRORS,
        )

    def _hand_over(self, step: int) -> None:
        """Write the weights and have the server load them, where that is due."""
        if self._loader is None:
            if not self._has_checked_model:
                from_rank_0(self._run(self._asker.find_model) if self._is_main else None)
                self._has_checked_model = True
            return
        if self._version is not None and step - self._version < self._weights.every:
            return
        self._folders.write(step)
        self._version = step
        from_rank_0(self._run(self._load) if self._is_main else None)

    def _load(self) -> None:
        assert self._loader is not None and self._version is not None
        self._loader.load(self._folders.path(self._version), self._version)
        self._asker.weights = str(self._version)
        named = self._loader.model()
        if named is not None:
            self._asker.model = named
        elif not self._has_checked_model:
            self._asker.find_model()
            self._has_checked_model = True

    def _run(self, job: Callable[[], Any]) -> Future[Any]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")
        return self._thread.submit(job)
