"""The engine of all that samples: `embedded`, `hf` and `openai` differ in their `Sampler` only."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from megatron_prefix.distributed.rank_results import from_rank_0, on_rank_0
from megatron_prefix.rollouts.engine import ENGINE_ERRORS
from megatron_prefix.rollouts.prompts import PromptSource
from megatron_prefix.rollouts.records import RolloutBatch
from megatron_prefix.rollouts.sampling.groups import Batch, GroupMaker
from megatron_prefix.rollouts.sampling.sampler import Sampler, answered, answered_by_ranks

logger = logging.getLogger(__name__)

Collect = Callable[[], Batch]
"""Waits for a batch that was begun. Collective."""


class SampledGroups:
    """Has a group of responses sampled to each prompt, on the weights that there are.

    Rank 0 reads prompts, makes groups and rewards them. Before a batch is sampled the weights are
    handed over, where that is due. With `prefetch` the next batch is sampled while this one is
    trained on, with the weights that there were before it. Methods are those of `RolloutEngine`.
    """

    def __init__(
        self,
        sampler: Sampler,
        source: PromptSource | None,
        maker: GroupMaker | None,
        *,
        prefetch: bool = False,
        max_staleness: int = 0,
    ) -> None:
        """Nothing is read or sampled yet.

        Args:
            sampler: remote, where it is to sample ahead (`prefetch`).
            source, maker: on rank 0; None elsewhere.
            prefetch: see above.
            max_staleness: versions that the policy of a group sampled ahead may lag behind.
        """
        assert sampler.is_remote or not prefetch
        self.sampler = sampler
        self.source = source
        self._maker = maker
        self._prefetch = prefetch
        self._max_staleness = max_staleness
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")
        self._under_way: Collect | None = None
        self._state: dict[str, Any] = {} if source is None else source.state_dict()
        self._metrics: dict[str, float] = {}

    def next_rollouts(self, num_groups: int, *, step: int) -> RolloutBatch | None:
        """The groups of the next `num_groups` prompts. Collective.

        Raises:
            ServerError: a server stayed away longer than its patience, refuses, or serves another
                model; and what `RolloutEngine` names.
        """
        batch, stale = self._sampled_ahead(step)
        version = self.sampler.hand_over(step)
        if batch is None:
            batch = self._begin(num_groups, step, version)()
        self._state = batch.source_state
        if self._prefetch:
            self._under_way = self._begin(num_groups, step + 1, version)
        self._metrics = {}
        if self.sampler.is_remote:
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
        """Continue from a `state_dict`, if the files are as they were then. Collective."""
        self._state = on_rank_0(functools.partial(self._go_to, state))

    def close(self) -> None:
        """Give up what is under way, close files, and end processes of rewards and environments."""
        self.sampler.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._under_way = None
        if self.source is not None:
            self.source.close()
        if self._maker is not None:
            self._maker.close()

    def _go_to(self, state: dict[str, Any]) -> dict[str, Any]:
        """On rank 0 the state there, which names the files as they are now."""
        if self.source is None:
            return state
        self.source.load_state_dict(state)
        return self.source.state_dict()

    def _sampled_ahead(self, step: int) -> tuple[Batch | None, int]:
        """The batch that was under way, if it is not too old; else how many groups are dropped."""
        if self._under_way is None:
            return None, 0
        collect, self._under_way = self._under_way, None
        batch = collect()
        if batch.version is None or step - batch.version <= self._max_staleness:
            return batch, 0
        logger.warning(
            "%d groups of version %d are older than weights.max_staleness: %d allows at "
            "step %d; they are sampled again",
            *(batch.num_groups, batch.version, self._max_staleness, step),
        )
        self._go_to(self._state)
        return None, batch.num_groups

    def _begin(self, num_groups: int, step: int, version: int | None) -> Collect:
        """Begin to make a batch."""
        making = None
        if self._maker is not None and self.source is not None:
            making = self._maker.batch(self.source, num_groups, step=step, version=version)
        if not self.sampler.is_remote:
            return functools.partial(answered_by_ranks, making, self.sampler, step=step)
        future: Future[Batch] | None = None
        if making is not None:
            sample = functools.partial(self.sampler.sample, step=step)
            future = self._threads.submit(answered, making, sample)
        return functools.partial(from_rank_0, future, tell=_told, errors=ENGINE_ERRORS)


def _told(batch: Batch) -> Batch:
    """What other ranks than 0 get of a batch."""
    return dataclasses.replace(batch, rollouts=None)
