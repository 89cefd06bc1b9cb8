"""What Megatron's checkpoint writer reports its results on, without a process of its own.

Megatron keeps a `multiprocessing` manager for that: a process of some 270 MB that takes seconds to
start, and that a killed rank leaves behind for ever. A save that is waited for needs no more than a
file, which this process shares with what it forks (Megatron before 0.15 writes in a fork).
"""

from __future__ import annotations

import contextlib
import pickle
import queue
import tempfile
from collections.abc import Iterator
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async


@contextlib.contextmanager
def write_queue() -> Iterator[None]:
    """Give Megatron's writer its queue while a checkpoint is saved and waited for."""
    before = filesystem_async._results_queue
    with tempfile.TemporaryFile() as file:
        filesystem_async._results_queue = _FileQueue(file)
        try:
            yield
        finally:
            filesystem_async._results_queue = before


class _FileQueue:
    """A queue for one item at a time, between a process and its forks.

    A pipe would not do: the fork could not end before a large item is read, and is waited for
    before it is.
    """

    def __init__(self, file: Any) -> None:
        self._file = file

    def put(self, item: Any) -> None:
        self._file.seek(0)
        pickle.dump(item, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        self._file.seek(0)
        content = self._file.read()
        if not content:
            raise queue.Empty
        self._file.seek(0)
        self._file.truncate()
        return pickle.loads(content)
