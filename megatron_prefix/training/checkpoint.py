"""Checkpoints in Megatron's distributed format (torch_dist), loadable at any layout.

    checkpoints/
      step_000010/          weights, optimizer, schedule, random states; trainer.json
      step_000020.partial/  being written, or cut off: never read, removed by the next save
      reference/            weights of the reference policy, where a KL term needs one

A checkpoint is written next to its final name and renamed when every rank is done, so a name
without `.partial` is always complete.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from megatron_prefix.training.initial_weights import use_stored_names
from megatron_prefix.training.model import ModelChunks
from megatron_prefix.training.torch_adam import initialise_adam, load_optimizer_state
from megatron_prefix.training.torch_dist import find_checkpoint
from megatron_prefix.training.write_queue import write_queue

logger = logging.getLogger(__name__)

# The optimizer's state by parameter, not by buffer, so that another tensor-, pipeline- or
# data-parallel size can load it. Newer releases call the format by another name.
_METADATA = {
    "distrib_optim_sharding_type": (
        "fully_reshardable"
        if hasattr(DistributedOptimizer, "sharded_param_state_fully_reshardable")
        else "fully_sharded_model_space"
    )
}
_STEP_NAME = re.compile(r"step_(\d{6,})")


class CheckpointFolder:
    """The checkpoints of one run. Every method is collective over all ranks."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        """Use (and create on the first save) `directory`, keeping the newest `keep` checkpoints."""
        if keep < 1:
            raise ValueError(f"output.keep: {keep} must be at least 1")
        self.directory = directory
        self.keep = keep

    @property
    def reference_path(self) -> Path:
        """Where the reference policy's weights are."""
        return self.directory / "reference"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.directory.is_dir():
            return []
        names = (_STEP_NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(int(match[1]) for match in names if match)

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

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.directory / f"step_{step:06d}"

    def save(
        self,
        step: int,
        chunks: ModelChunks,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        *,
        state: dict[str, Any],
    ) -> Path:
        """Write everything that continuing needs.

        Args:
            state: the trainer's own state, as plain JSON values.

        Returns:
            The folder written.
        """
        model = _model_state(chunks)
        contents = {
            **model,
            "optimizer": optimizer.sharded_state_dict(model, metadata=_METADATA),
            "scheduler": scheduler.state_dict(),
            "random": _random_state(),
        }
        state = {**state, "layout": _layout()}
        path = self._write(self.path(step), contents, state)
        if dist.get_rank() == 0:
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(old))
        dist.barrier()
        return path

    def save_reference(self, chunks: ModelChunks) -> Path:
        """Write the current weights as the reference policy's."""
        return self._write(self.reference_path, _model_state(chunks), {"layout": _layout()})

    def load_latest(
        self,
        chunks: ModelChunks,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
    ) -> dict[str, Any]:
        """Load the newest complete checkpoint and return the trainer's state.

        Random states are restored where the layout is the one that was saved.

        Raises:
            ValueError: there is none, or it does not fit the model.
        """
        step = self.latest_step()
        if step is None:
            raise ValueError(f"{self.directory}: no complete checkpoint")
        path = self.path(step)
        state = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
        initialise_adam(optimizer)
        model = _model_state(chunks)
        wanted = {
            **model,
            "optimizer": optimizer.sharded_state_dict(model, is_loading=True, metadata=_METADATA),
        }
        same_layout = state["layout"] == _layout()
        if same_layout:
            wanted["random"] = _random_state()
        else:
            logger.info("%s: saved at another layout, random states start anew", path)
        loaded = _load(wanted, path)
        _load_model(chunks, loaded)
        load_optimizer_state(optimizer, loaded["optimizer"])
        scheduler.load_state_dict(loaded["scheduler"])
        if same_layout:
            _set_random_state(loaded["random"])
        return state

    @staticmethod
    def load_weights(
        path: Path, chunks: ModelChunks, optimizer: MegatronOptimizer | None = None
    ) -> None:
        """Load the weights only, from a checkpoint of this or any Megatron trainer.

        Args:
            path: a checkpoint, or a folder of them whose newest is taken: a run's, one of
                Megatron-LM's or of `tools/convert_checkpoint.py`.
            optimizer: takes the weights over.

        Raises:
            ValueError: the folder holds no distributed checkpoint, or it does not fit the model.
        """
        path = find_checkpoint(path)
        wanted = _model_state(chunks)
        use_stored_names(wanted, path)
        _load_model(chunks, _load(wanted, path))
        if optimizer is not None:
            optimizer.reload_model_params()

    def _write(self, path: Path, contents: dict[str, Any], state: dict[str, Any]) -> Path:
        _require_psutil()
        partial = path.with_name(path.name + ".partial")
        if dist.get_rank() == 0:
            for leftover in [*self.directory.glob("*.partial"), path]:
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        with write_queue():
            dist_checkpointing.save(contents, str(partial))
        dist.barrier()
        if dist.get_rank() == 0:
            text = json.dumps(state, indent=1, default=str)
            (partial / "trainer.json").write_text(text, encoding="utf-8")
            _sync_to_disk(partial)
            os.replace(partial, path)
        dist.barrier()
        return path


def _model_state(chunks: ModelChunks) -> dict[str, Any]:
    if len(chunks.bare) == 1:
        return {"model": chunks.bare[0].sharded_state_dict()}
    return {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks.bare)}


def _load_model(chunks: ModelChunks, loaded: dict[str, Any]) -> None:
    for i, chunk in enumerate(chunks.bare):
        chunk.load_state_dict(loaded["model" if len(chunks.bare) == 1 else f"model{i}"])


def _load(wanted: dict[str, Any], path: Path) -> dict[str, Any]:
    if not dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        raise ValueError(f"{path}: not a Megatron distributed checkpoint (no metadata.json)")
    try:
        return dist_checkpointing.load(wanted, str(path))
    except dist_checkpointing.core.CheckpointingException as error:
        raise ValueError(f"{path}: does not fit this model: {error}") from error
    except CheckpointException as error:
        # torch collects what each rank raised while it planned its reads.
        reasons = sorted({str(exception) for exception, _ in error.failures.values()})
        raise ValueError(f"{path}: does not fit this model: {'; '.join(reasons)}") from error


def _layout() -> dict[str, int]:
    return {
        "world_size": dist.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
    }


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
    try:
        import psutil  # noqa: F401
    except ImportError as error:
        # Megatron's writer imports it in a child process, and would wait for it for ever.
        raise ValueError(
            "checkpoints need the psutil package, which Megatron-Core does not declare: install "
            "megatron-prefix[train]"
        ) from error


def _sync_to_disk(folder: Path) -> None:
    """Have the files on the disk before the folder gets its final name."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
