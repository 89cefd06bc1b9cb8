"""Megatron's distributed save, in one format, by the writer that a run names.

`mcore` is Megatron-Core's own writer, in every release. `nvrx` is the writer of
nvidia-resiliency-ext, which Megatron-Core knows since 0.17, prefers, and has to have installed.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import pickle
import queue
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron.core import dist_checkpointing
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_prefix.megatron.releases import release
from megatron_prefix.system_errors import system_error

OPTIMIZER_METADATA = {
    # The optimizer's state by parameter, not by buffer, so that another tensor-, pipeline- or
    # data-parallel size can load it. Newer releases call the format by another name.
    "distrib_optim_sharding_type": (
        "fully_reshardable"
        if hasattr(DistributedOptimizer, "sharded_param_state_fully_reshardable")
        else "fully_sharded_model_space"
    )
}

_MODULES = {
    "mcore": "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "nvrx": "nvidia_resiliency_ext.checkpointing.async_ckpt.filesystem_async",
}
_NAMES_WRITER = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters


def check_writer(name: str) -> None:
    """Refuse a writer that the release does not know, or that is not installed.

    Raises:
        ValueError: it names the writer, and what to install or set.
    """
    if name == "mcore":
        return
    instead = "or set output.checkpoint_writer: mcore"
    if not _NAMES_WRITER:
        raise ValueError(
            f"output.checkpoint_writer: {name} is not in megatron-core "
            f"{release()}; install megatron-core 0.17 or newer, {instead}"
        )
    try:
        importlib.import_module(_MODULES[name])
    except ImportError as error:
        raise ValueError(
            f"output.checkpoint_writer: {name} needs nvidia-resiliency-ext 0.6 or newer ({error}); "
            f"install it, {instead}"
        ) from error


@dataclass(frozen=True, kw_only=True)
class PendingSave:
    """A checkpoint whose tensors are planned and not written yet."""

    write: Callable[[], None] | None
    """Writes this rank's files, in a fork of this process; None where the rank has none."""
    finalize: Callable[[], None]
    """Completes the folder when all ranks have written. Collective. It raises torch's
    CheckpointException where a rank has failed, on rank 0 with the failures by rank."""


def begin_save(contents: dict[str, Any], folder: Path, *, writer: str) -> PendingSave:
    """Plan a checkpoint in torch_dist format, and copy tensors of a GPU to the host. Collective.

    Args:
        writer: `mcore` or `nvrx`.
    """
    module = importlib.import_module(_MODULES[writer])
    # The manager process that would carry results, one for each rank, takes seconds to start and
    # 270 MB, and dies of any signal to the rank's process group.
    results = module._results_queue = _InheritedResults()
    strategy = {"async_strategy": writer} if _NAMES_WRITER else {}
    request = dist_checkpointing.save(contents, str(folder), async_sharded_save=True, **strategy)

    def finalize() -> None:
        for call in request.finalize_fns:
            call()

    if request.async_fn is None:
        return PendingSave(write=None, finalize=finalize)
    arguments = list(request.async_fn_args)
    if request.preload_fn is not None:
        arguments[1] = request.preload_fn()
    write = functools.partial(request.async_fn, *arguments, **request.async_fn_kwargs)
    return PendingSave(
        write=functools.partial(_write_and_report, write, module.FileSystemWriterAsync, results),
        finalize=finalize,
    )


class _InheritedResults:
    """The `put` and `get_nowait` of a queue for one result, the last, from a forked process."""

    def __init__(self) -> None:
        self._file = _anonymous_file()

    def put(self, result: Any) -> None:
        self._file.seek(0)
        self._file.truncate()
        pickle.dump(result, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except EOFError:
            raise queue.Empty from None


def _anonymous_file() -> BinaryIO:
    if sys.platform == "linux":  # in memory: a full disk must not swallow the report of it
        return os.fdopen(os.memfd_create("checkpoint results"), "w+b")
    return tempfile.TemporaryFile()


def _write_and_report(
    write: Callable[[], None], writer_class: Any, results: _InheritedResults
) -> None:
    """Run a save's writing function in a process of its own, and report why it failed.

    From Megatron-Core 0.17 on, threads write the files, and of a thread's error only the class
    reaches the report. The error itself is what `write_preloaded_data` returns; it replaces the
    report here. Older releases write by processes, whose errors arrive.
    """
    failures: list[Exception] = []
    original = writer_class.write_preloaded_data

    def write_file(*args: Any, **kwargs: Any) -> Any:
        outcome = original(*args, **kwargs)
        if outcome is not None and isinstance(outcome[1], Exception):
            failures.append(outcome[1])
        return outcome

    writer_class.write_preloaded_data = staticmethod(write_file)
    try:
        write()
    except AssertionError:
        if not failures:  # Megatron asserts that no thread has failed
            raise
    if failures:
        results.put(system_error(failures[0]) or failures[0])
