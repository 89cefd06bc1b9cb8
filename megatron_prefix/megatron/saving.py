"""Megatron's distributed save, in the format and by the writer that every release has.

Megatron-Core 0.19 saves asynchronously through nvidia-resiliency-ext unless told otherwise; its
own writer, `mcore`, is in every release and needs nothing more.
"""

from __future__ import annotations

import inspect
import os
import pickle
import queue
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

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

_STRATEGY: dict[str, Any] = (
    {"async_strategy": "mcore"}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    else {}
)


def begin_save(contents: dict[str, Any], folder: Path) -> AsyncRequest:
    """Prepare a checkpoint in torch_dist format; the request that is returned writes it.

    Collective over all ranks.
    """
    _use_inherited_results()
    return dist_checkpointing.save(contents, str(folder), async_sharded_save=True, **_STRATEGY)


def _use_inherited_results() -> None:
    """Let Megatron's writer report through an inherited file instead of a manager process.

    The manager, one for each rank, takes seconds to start and 270 MB, and dies of any signal to
    the rank's process group. Call it before each checkpoint.
    """
    filesystem_async._results_queue = _InheritedResults()


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


def write_and_report(write: Callable[[], None]) -> None:
    """Run a save's writing function in a process of its own, and report why it failed.

    From Megatron-Core 0.17 on, threads write the files, and of a thread's error only the class
    reaches the report. The error itself is what `write_preloaded_data` returns; it replaces the
    report here. Older releases write by processes, whose errors arrive.
    """
    failures: list[Exception] = []
    original = FileSystemWriterAsync.write_preloaded_data

    def write_file(*args: Any, **kwargs: Any) -> Any:
        outcome = original(*args, **kwargs)
        if outcome is not None and isinstance(outcome[1], Exception):
            failures.append(outcome[1])
        return outcome

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write_file)
    try:
        write()
    except AssertionError:
        if not failures:  # Megatron asserts that no thread has failed
            raise
    if failures:
        filesystem_async._results_queue.put(system_error(failures[0]) or failures[0])
