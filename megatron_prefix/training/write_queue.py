"""A queue in this process for Megatron's checkpoint writer to report on.

Megatron keeps a `multiprocessing` manager for that, so that a save in the background could report
too: a process of some 270 MB that takes seconds to start, and that a killed rank leaves behind for
ever. Our saves are not in the background; what writes them runs in the process that waits.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator

from megatron.core.dist_checkpointing.strategies import filesystem_async


@contextlib.contextmanager
def queue_of_this_process() -> Iterator[None]:
    """Give Megatron's writer a queue without a process of its own while a checkpoint is saved."""
    before = filesystem_async._results_queue
    filesystem_async._results_queue = queue.SimpleQueue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before
