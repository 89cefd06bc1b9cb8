"""The helper process of Megatron's checkpoint writer, made to end with the rank that started it.

Megatron keeps a `multiprocessing` manager for the queue that its writers report on. A rank that is
killed leaves this process behind for ever, with some 270 MB and the rank's open files.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing.managers import SyncManager

from megatron.core.dist_checkpointing.strategies import filesystem_async

_PR_SET_PDEATHSIG = 1


def ensure_write_queue() -> None:
    """Give Megatron's writer its queue, unless it has one. Call it before a checkpoint is saved."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(initializer=_end_with_parent, initargs=(os.getpid(),))
        filesystem_async._results_queue = manager.Queue()


def _end_with_parent(parent: int) -> None:
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has died before the call
        os.kill(os.getpid(), signal.SIGKILL)
