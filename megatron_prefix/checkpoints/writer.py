"""Megatron's checkpoint writer in a process of its own, which ends with the rank that started it.

The process is a fork: it sees the tensors as they were, whatever training does to them meanwhile
(tensors of a GPU are copied to the host before). Up to Megatron-Core 0.16 it forks in turn one
process for each file; newer releases use threads. No such process outlives the rank, since what it
holds open would keep other ranks from noticing that the rank has gone. None takes the signals that
ask a run to stop, which schedulers send to every process.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

from megatron_prefix.distributed.stop import STOP_SIGNALS
from megatron_prefix.megatron.saving import PendingSave
from megatron_prefix.system_errors import system_error

_PR_SET_PDEATHSIG = 1
_WATCH_S = 0.05


class CheckpointWriter:
    """One checkpoint's files, as far as this rank writes them."""

    def __init__(self, save: PendingSave) -> None:
        """Begin to write what `begin_save` has planned."""
        self._save = save
        self._process: multiprocessing.process.BaseProcess | None = None
        if save.write is None:
            return
        self._process = multiprocessing.get_context("fork").Process(
            target=_write, args=(os.getpid(), save.write), name="checkpoint writer"
        )
        # Blocked signals stay blocked in what is forked, from its first moment.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def is_writing(self) -> bool:
        """Whether this rank has not written all of its files yet."""
        return self._process is not None and self._process.is_alive()

    @property
    def failure(self) -> str | None:
        """Why this rank's writer has ended without writing all, unless it says so itself."""
        code = None if self._process is None else self._process.exitcode
        return f"a writing process ended with exit code {code}" if code else None

    def finalize(self) -> None:
        """Complete the folder when all ranks have written. Collective.

        Raises:
            CheckpointException: a rank has failed; on rank 0 with the failures by rank.
        """
        self._save.finalize()

    def abandon(self) -> None:
        """End the writing process, if it still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.join()


def _write(parent: int, write: Callable[[], None]) -> None:
    _end_with(parent)
    ForkingPickler.register(RuntimeError, _reduce_to_system_error)
    os.register_at_fork(after_in_child=functools.partial(_end_with, os.getpid()))
    threading.Thread(target=_end_with_children, daemon=True).start()
    write()


def _reduce_to_system_error(error: RuntimeError) -> str | tuple[Any, ...]:
    """What goes from a process that writes a file to the one that waits for it.

    An error that goes from process to process leaves behind what it was raised in the course of.
    """
    return (system_error(error) or error).__reduce__()


def _end_with(parent: int) -> None:
    """Have this process killed when its parent ends."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def _end_with_children() -> None:
    """End the writer if a process that writes a file for it is killed: it would wait for ever."""
    known: set[multiprocessing.process.BaseProcess] = set()
    while True:
        known.update(multiprocessing.active_children())  # those that have ended drop out of it
        if any(child.exitcode for child in known):
            os._exit(1)
        time.sleep(_WATCH_S)
