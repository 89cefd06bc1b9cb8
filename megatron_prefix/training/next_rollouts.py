"""The rollout batch that is trained on next: sampled, or taken over from where a run stopped."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from megatron_prefix.checkpoints.folder import CheckpointFolder
from megatron_prefix.config import RunConfig
from megatron_prefix.distributed.rank_results import on_rank_0, raise_together, rank_0_alone
from megatron_prefix.rollouts.engine import EndOfRollouts, RolloutEngine
from megatron_prefix.rollouts.records import RolloutBatch, RolloutSummary
from megatron_prefix.training.phases import Phases
from megatron_prefix.training.resampling import Resampling
from megatron_prefix.training.token_advantages import with_token_advantages
from megatron_prefix.training.waiting import read_waiting, write_waiting

logger = logging.getLogger(__name__)


class NextRollouts:
    """Rollouts that are not trained on yet. Every method is collective over all ranks."""

    def __init__(
        self, config: RunConfig, engine: RolloutEngine, checkpoints: CheckpointFolder
    ) -> None:
        """None are made yet.

        Args:
            config: of the run.
            engine: makes them.
            checkpoints: of the run; what is being written is completed where data are refused.
        """
        self.batch: RolloutBatch | None = None
        """On rank 0."""
        self.summary: RolloutSummary | None = None
        """On every rank; None: no rollouts are there."""
        self._config, self._engine, self._checkpoints = config, engine, checkpoints
        self._resampling: Resampling | None = None
        if config.objective.zero_advantages == "resample":
            self._resampling = Resampling(
                config.objective,
                num_groups=config.rollouts.groups_per_step,
                at_least=config.training.optimizer_steps_per_rollout,
            )

    def make(self, *, step: int, phases: Phases) -> bool:
        """Have a rollout batch made; whether there is one.

        Args:
            step: that the run has done.
            phases: that the time is counted in.

        Raises:
            ValueError: rank 0 or all ranks refuse the data.
        """
        with phases.measured("rollout"):
            batch = self._sample(step)
            if self._resampling is not None:
                with self._checkpoints.finished_when_refused():
                    batch = self._resampling.fill(batch, lambda: self._sample(step))
        self.batch = batch
        self.summary = on_rank_0(lambda: None if batch is None else batch.summary())
        return self.summary is not None

    def clear(self) -> None:
        """The rollouts are trained on."""
        self.batch = self.summary = None

    def metrics(self) -> dict[str, float]:
        """Of how the last batch was made."""
        resampling = {} if self._resampling is None else self._resampling.metrics()
        return {**self._engine.metrics(), **resampling}

    def take_waiting(self, checkpoint: Path) -> dict[str, Any] | None:
        """Go on with rollouts that were made before the run was stopped.

        Returns:
            The engine's state after them; None where no rollouts wait in the checkpoint's folder.
        """
        waiting = rank_0_alone(lambda: read_waiting(checkpoint))
        found = on_rank_0(lambda: None if waiting is None else (waiting[0].summary(), waiting[1]))
        if found is None:
            return None
        self.batch = None if waiting is None else waiting[0]
        self.summary, engine_state = found
        return engine_state

    def keep_waiting(self, checkpoint: Path) -> None:
        """Write rollouts that are not trained on beside the checkpoint, if there is one."""
        if self.batch is not None and checkpoint.is_dir():  # on rank 0 alone
            write_waiting(checkpoint, self.batch, self._engine.state_dict())

    def _sample(self, step: int) -> RolloutBatch | None:
        """A rollout batch on rank 0, unless they have ended."""
        # What rank 0 does for all ranks is refused without its number, which says nothing.
        with self._checkpoints.finished_when_refused(), raise_together(name_rank=False):
            try:
                batch = self._engine.next_rollouts(self._config.rollouts.groups_per_step, step=step)
                if batch is not None:
                    batch = with_token_advantages(batch, self._config.objective)
                return batch
            except EndOfRollouts as end:
                logger.info("after step %d: %s", step, end)
        return None
