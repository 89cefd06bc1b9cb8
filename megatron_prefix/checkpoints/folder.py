"""Checkpoints in Megatron's distributed format (torch_dist), loadable at any layout.

Each is written while training goes on, from a copy of the state as it was; see
`files.py` for the folders and for what holds when a run is killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_prefix.checkpoints import files
from megatron_prefix.checkpoints.random_state import layout_of_run, random_state, set_random_state
from megatron_prefix.checkpoints.saved_settings import (
    change_of_clipping,
    check_sharding,
    log_changes,
)
from megatron_prefix.checkpoints.unfinished import UnfinishedCheckpoint
from megatron_prefix.checkpoints.weights import load_model_state, load_state, model_state
from megatron_prefix.distributed.rank_results import raise_together
from megatron_prefix.megatron.optimizer_settings import load_with_settings
from megatron_prefix.megatron.saving import OPTIMIZER_METADATA, check_writer
from megatron_prefix.megatron.torch_adam import initialise_adam
from megatron_prefix.model.build import ModelChunks

logger = logging.getLogger(__name__)

_POLL_S = 0.05


class CheckpointFolder:
    """The checkpoints of one run. Every method is collective over all ranks."""

    def __init__(self, directory: Path, *, keep: int, writer: str = "mcore") -> None:
        """Use (and create on the first save) `directory`, keeping the newest `keep` checkpoints.

        Args:
            writer: `mcore` or `nvrx`.

        Raises:
            ValueError: the writer cannot be used here.
        """
        if keep < 1:
            raise ValueError(f"output.keep: {keep} must be at least 1")
        check_writer(writer)
        self.writer = writer
        self.directory = directory
        self.keep = keep
        self.bests: list[int] = []
        """Steps that were the best at their time; the last of them that is complete stays."""
        self._unfinished: UnfinishedCheckpoint | None = None

    def reference_path(self, step: int) -> Path | None:
        """Where the reference policy's weights at a step are: the newest taken by then."""
        taken = [at for at in files.reference_steps(self.directory) if at <= step]
        return files.reference_path(self.directory, taken[-1]) if taken else None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return files.complete_steps(self.directory)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, as rank 0 sees it."""
        found = [max(self.steps(), default=None)]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def set_aside(self) -> None:
        """Rename what an earlier run left here to the first free of `checkpoints.1`, `.2`, ...

        Its steps would otherwise be taken for later ones of the run that begins now.
        """
        if dist.get_rank() == 0 and self.steps():
            names = (self.directory.with_name(f"{self.directory.name}.{i}") for i in count(1))
            free = next(name for name in names if not name.exists())
            logger.warning("%s: of an earlier run, renamed to %s", self.directory, free.name)
            os.replace(self.directory, free)
        dist.barrier()

    def begin(self) -> None:
        """Remove what was cut off, and set aside newest checkpoints that have lost files since.

        Nothing is lost by falling back to the last whole one: all that a run depends on is in it.

        Raises:
            ValueError: there are checkpoints, and none is whole.
        """
        with raise_together(name_rank=False):
            if dist.get_rank() == 0:
                files.remove_partial(self.directory)
                for damaged in files.set_damaged_aside(self.directory):
                    logger.warning(
                        "%s; renamed to .damaged, the run continues from the checkpoint before it",
                        damaged,
                    )

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return files.step_path(self.directory, step)

    def save(
        self,
        step: int,
        chunks: ModelChunks,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        *,
        state: dict[str, Any],
        background: bool = False,
    ) -> Path:
        """Write everything that continuing needs, as it is now.

        Args:
            state: the trainer's own state, as plain JSON values.
            background: return when writing has begun; `poll` and `finish` then complete the
                checkpoint. One that is still being written is completed first.

        Returns:
            The folder that is written.

        Raises:
            ValueError: this checkpoint, or the one before it, could not be written.
        """
        model = model_state(chunks)
        contents = {
            **model,
            "optimizer": optimizer.sharded_state_dict(model, metadata=OPTIMIZER_METADATA),
            "scheduler": scheduler.state_dict(),
            "random": random_state(),
        }
        state = {**state, "layout": layout_of_run()}
        path = self.path(step)
        self._begin_to_write(path, contents, state)
        if not background:
            self.finish()
        return path

    def poll(self) -> bool:
        """Complete the checkpoint that is being written if all ranks have written their part.

        Returns:
            Whether nothing is being written any more.

        Raises:
            ValueError: it could not be written; the checkpoints before it are as they were.
        """
        unfinished = self._unfinished
        if unfinished is None:
            return True
        if unfinished.is_writing():
            return False
        self._unfinished = None
        unfinished.finalize()
        with unfinished.failing_together():
            if dist.get_rank() == 0:
                files.complete(unfinished.partial, unfinished.path, unfinished.state)
                steps = self.steps()
                best = max({*steps} & {*self.bests}, default=None)
                for old in steps[: -self.keep]:
                    if old != best:
                        files.remove(self.path(old))
        return True

    def finish(self) -> None:
        """Wait until nothing is being written any more.

        Raises:
            ValueError: it could not be written; the checkpoints before it are as they were.
        """
        while not self.poll():  # ranks ask together, so that none waits for long in a collective
            time.sleep(_POLL_S)

    @contextlib.contextmanager
    def finished_when_refused(self) -> Iterator[None]:
        """Complete the checkpoint that is being written where all ranks refuse the data."""
        try:
            yield
        except ValueError:
            self.finish()
            raise

    def abandon(self) -> None:
        """Stop writing, on this rank alone; what was begun is never taken for a checkpoint."""
        if self._unfinished is not None:
            self._unfinished.writer.abandon()

    def save_reference(self, chunks: ModelChunks, *, step: int) -> None:
        """Write the current weights as the reference policy's from a step on, 0 for the start.

        Those that no checkpoint needs any more are removed.
        """
        path = files.reference_path(self.directory, step)
        self._begin_to_write(path, model_state(chunks), {"layout": layout_of_run()})
        self.finish()
        if dist.get_rank() == 0:
            oldest = min(self.steps(), default=step)
            taken = files.reference_steps(self.directory)
            newest_needed_first = [at for at in reversed(taken) if at <= oldest]
            later_run = [at for at in taken if at > step]
            for at in (*newest_needed_first[1:], *later_run):
                files.remove(files.reference_path(self.directory, at))

    def load_latest(
        self,
        chunks: ModelChunks,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        *,
        keep_settings: bool = False,
        remaining_steps: Callable[[int], int] | None = None,
    ) -> dict[str, Any]:
        """Load the newest complete checkpoint and return the trainer's state.

        Random states are restored where the layout is the one that was saved. Rank 0 logs in one
        line which settings of the optimizer and of its schedule differ.

        Args:
            optimizer: built from the run's configuration.
            scheduler: the same.
            keep_settings: take learning rate, schedule, weight decay, betas and epsilon from the
                checkpoint, not from the run's configuration.
            remaining_steps: optimizer steps that the run still takes behind a step, where its
                schedule ends with the run; see `load_with_settings`.

        Raises:
            ValueError: there is none, or it does not fit the model.
        """
        step = self.latest_step()
        if step is None:
            raise ValueError(f"{self.directory}: no complete checkpoint")
        path = self.path(step)
        state = files.read_state(path)
        check_sharding(path, state, sharded=optimizer.config.use_distributed_optimizer)
        initialise_adam(optimizer)
        model = model_state(chunks)
        wanted = {
            **model,
            "optimizer": optimizer.sharded_state_dict(
                model, is_loading=True, metadata=OPTIMIZER_METADATA
            ),
        }
        same_layout = state["layout"] == layout_of_run()
        if same_layout:
            wanted["random"] = random_state()
        else:
            logger.info("%s: saved at another layout, random states start anew", path)
        loaded = load_state(wanted, path)
        load_model_state(chunks, loaded)
        changes = load_with_settings(
            optimizer,
            scheduler,
            saved_optimizer=loaded["optimizer"],
            saved_scheduler=loaded["scheduler"],
            keep_saved=keep_settings,
            remaining_steps=remaining_steps and remaining_steps(step),
        )
        if not keep_settings:
            changes += change_of_clipping(state, optimizer.config.clip_grad)
        log_changes(changes, keep_settings=keep_settings)
        if same_layout:
            set_random_state(loaded["random"])
        return state

    def _begin_to_write(self, path: Path, contents: dict[str, Any], state: dict[str, Any]) -> None:
        self.finish()
        self._unfinished = UnfinishedCheckpoint.begin(path, contents, state, writer=self.writer)
