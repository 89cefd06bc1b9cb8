"""The `openai` engine: rank 0 asks the server; all ranks hand over the weights."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from megatron_prefix.config import ServerConfig, WeightsConfig
from megatron_prefix.distributed.rank_results import from_rank_0
from megatron_prefix.rollouts.engine import ENGINE_ERRORS
from megatron_prefix.rollouts.hf.folders import PolicyFolders
from megatron_prefix.rollouts.prompts import PromptSource
from megatron_prefix.rollouts.records import RolloutBatch
from megatron_prefix.rollouts.rewards import RewardFunction, close_reward
from megatron_prefix.rollouts.server.agent import AskedAgent
from megatron_prefix.rollouts.server.asking import Asker
from megatron_prefix.rollouts.server.batches import Batch, BatchSampler, GroupSpec
from megatron_prefix.rollouts.server.client import ServerClient
from megatron_prefix.rollouts.server.kept_weights import KeptWeights
from megatron_prefix.rollouts.server.loading import WeightLoader

logger = logging.getLogger(__name__)


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
        reward: RewardFunction | None,
        spec: GroupSpec,
        *,
        agent: AskedAgent | None = None,
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
            reward: of each response; None where an environment gives rewards.
            spec: of the groups.
            agent: asks for responses of several turns, through the asker; None: of one.
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
        self._agent = agent
        self._kept = KeptWeights(asker)
        self._sampler = BatchSampler(
            asker if agent is None else agent,
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
        if self._agent is not None:
            self._agent.close()

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
        """Have the server load the weights that were written last, and look whether it has."""
        assert self._loader is not None and self._version is not None
        folder = self._folders.path(self._version)
        before = self._kept.before()
        self._loader.load(folder, self._version)
        self._asker.weights = str(self._version)
        named = self._loader.model()
        if named is not None:
            self._asker.requests.model = named
        elif not self._has_checked_model:
            self._asker.find_model()
            self._has_checked_model = True
        self._kept.check(folder, before)

    def _run(self, job: Callable[[], Any]) -> Future[Any]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")
        return self._thread.submit(job)
