"""Checkpoints in Megatron's distributed format (torch_dist), loadable at any layout.

Each is written while training goes on, from a copy of the state as it was; see
`files.py` for the folders and for what holds when a run is killed.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from megatron_prefix.checkpoints import files
from megatron_prefix.checkpoints.weights import load_model_state, load_state, model_state
from megatron_prefix.checkpoints.writer import CheckpointWriter
from megatron_prefix.distributed.rank_results import raise_together
from megatron_prefix.megatron.optimizer_settings import load_with_settings
from megatron_prefix.megatron.saving import OPTIMIZER_METADATA, begin_save, check_writer
from megatron_prefix.megatron.torch_adam import initialise_adam
from megatron_prefix.model.build import ModelChunks
from megatron_prefix.packages import needed_by
from megatron_prefix.system_errors import system_error

logger = logging.getLogger(__name__)

_POLL_S = 0.05


@dataclasses.dataclass(kw_only=True)
class _Unfinished:
    """A checkpoint that is being written."""

    path: Path
    partial: Path
    writer: CheckpointWriter
    state: dict[str, Any]


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
        self._unfinished: _Unfinished | None = None

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
            "random": _random_state(),
        }
        state = {**state, "layout": _layout()}
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
        if _on_any_rank(unfinished.writer.is_writing):
            return False
        self._unfinished = None
        with _failing_together(unfinished):
            if unfinished.writer.failure is not None:
                raise ValueError(unfinished.writer.failure)
        error = None
        try:
            with _failing_alone(unfinished.path, unfinished.partial):
                unfinished.writer.finalize()
        except CheckpointException as caught:
            error = caught
        with _failing_together(unfinished):
            if error is not None and error.failures:
                raise ValueError("; ".join(sorted({str(e) for e, _ in error.failures.values()})))
        with _failing_together(unfinished):
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

    def abandon(self) -> None:
        """Stop writing, on this rank alone; what was begun is never taken for a checkpoint."""
        if self._unfinished is not None:
            self._unfinished.writer.abandon()

    def save_reference(self, chunks: ModelChunks, *, step: int) -> None:
        """Write the current weights as the reference policy's from a step on, 0 for the start.

        Those that no checkpoint needs any more are removed.
        """
        path = files.reference_path(self.directory, step)
        self._begin_to_write(path, model_state(chunks), {"layout": _layout()})
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
        _check_sharding(path, state, sharded=optimizer.config.use_distributed_optimizer)
        initialise_adam(optimizer)
        model = model_state(chunks)
        wanted = {
            **model,
            "optimizer": optimizer.sharded_state_dict(
                model, is_loading=True, metadata=OPTIMIZER_METADATA
            ),
        }
        same_layout = state["layout"] == _layout()
        if same_layout:
            wanted["random"] = _random_state()
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
            changes += _change_of_clipping(state, optimizer.config.clip_grad)
        if changes and dist.get_rank() == 0:
            logger.info(
                "%s (optimizer.on_resume: %s): %s",
                "the settings of the checkpoint are used, not those of the configuration"
                if keep_settings
                else "the settings of the configuration are used, not those of the checkpoint",
                "checkpoint" if keep_settings else "config",
                ", ".join(changes),
            )
        if same_layout:
            _set_random_state(loaded["random"])
        return state

    def _begin_to_write(self, path: Path, contents: dict[str, Any], state: dict[str, Any]) -> None:
        self.finish()
        _require_psutil()
        partials: list[Path | None] = [None]
        with raise_together(name_rank=False):
            if dist.get_rank() == 0:
                try:
                    files.remove_partial(self.directory)
                    partials[0] = files.begin(path)
                except OSError as error:
                    raise _not_written(path, error) from error
        dist.broadcast_object_list(partials, src=0)
        partial = partials[0]
        assert partial is not None
        with _failing_alone(path, partial):
            save = begin_save(contents, partial, writer=self.writer)
        self._unfinished = _Unfinished(
            path=path, partial=partial, writer=CheckpointWriter(save), state=state
        )


@contextmanager
def _failing_together(unfinished: _Unfinished) -> Iterator[None]:
    """Raise what fails on one rank on all of them, and clear away what was written."""
    try:
        with raise_together(name_rank=False):
            try:
                yield
            except (ValueError, OSError) as error:
                raise _not_written(unfinished.path, error) from error
    except ValueError:
        if dist.get_rank() == 0:
            files.remove_partial(unfinished.path.parent)
        raise


@contextmanager
def _failing_alone(path: Path, partial: Path) -> Iterator[None]:
    """Where rank 0 writes and the others wait for it, say what it could not write.

    Raises:
        ValueError: on rank 0, which has to end then: the others wait until it has.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if dist.get_rank() != 0:
            raise
        reason = system_error(error) or files.write_problem(partial)
        if reason is None:
            raise
        files.remove_partial(path.parent)
        raise _not_written(path, reason) from error


def _not_written(path: Path, reason: Exception) -> ValueError:
    return ValueError(
        f"{path}: could not be written: {reason}; the checkpoints before it are as they were"
    )


def _on_any_rank(condition: bool) -> bool:
    flag = torch.tensor([int(condition)], device=torch.cuda.current_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def _layout() -> dict[str, int]:
    return {
        "world_size": dist.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
    }


def _saved_settings(state: dict[str, Any]) -> dict[str, Any]:
    """The optimizer section of the run that saved a checkpoint; empty where none is recorded."""
    return state.get("config", {}).get("optimizer", {})


def _change_of_clipping(state: dict[str, Any], clip_grad: float) -> list[str]:
    """Clipping is no state of the optimizer: only the configuration that was saved says it."""
    saved = _saved_settings(state).get("clip_grad", clip_grad)
    return [] if saved == clip_grad else [f"optimizer.clip_grad {saved} -> {clip_grad}"]


def _check_sharding(path: Path, state: dict[str, Any], *, sharded: bool) -> None:
    """Refuse a checkpoint whose optimizer state Megatron wrote in the form of the other optimizer.

    Raises:
        ValueError: it did.
    """
    saved = _saved_settings(state).get("use_distributed_optimizer", sharded)
    if saved != sharded:
        raise ValueError(
            f"optimizer.use_distributed_optimizer: {str(sharded).lower()}, but {path} was saved "
            f"with {str(saved).lower()}, and Megatron-Core stores the two in different forms; set "
            f"it to {str(saved).lower()}, or start a new run with output.load: {path.parent}"
        )


def _random_state() -> ShardedObject:
    """This rank's generators; every rank has its own."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "megatron": get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("random", state, (dist.get_world_size(),), (dist.get_rank(),))


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["megatron"])


def _require_psutil() -> None:
    # Megatron's writer imports it in a child process, and would wait for it for ever.
    with needed_by("writing a checkpoint", extra="train"):
        import psutil  # noqa: F401
