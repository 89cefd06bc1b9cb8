"""Where the time of a step goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Phases:
    """Seconds of each phase since they were taken last, by this process's clock.

    On a GPU, work that is queued counts in the phase that waits for it: nothing is synchronised
    for these numbers.
    """

    def __init__(self) -> None:
        """Nothing is measured yet."""
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Add the time of the block to a phase, also where it raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """`NAME_seconds` of each phase that has run; they begin at 0 again."""
        taken = {f"{name}_seconds": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken
