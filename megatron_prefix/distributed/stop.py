"""Signals that ask a run to stop: noticed at once, acted upon between two optimizer steps.

Slurm sends SIGTERM when it takes a node back, and SIGUSR1 (or what `--signal` says) ahead of a time
limit; torchrun passes SIGTERM on to its workers. A rank waits for most of its time in collectives,
during which Python runs no signal handler, so a thread reads the signals from a socket.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from types import TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop, within a `with` block of the main thread."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """The first signal; None while there was none."""
        self._on_request: Callable[[], None] = lambda: None

    def when_made(self, call: Callable[[], None]) -> None:
        """Call this once, from a thread, when the first signal comes."""
        self._on_request = call

    def __enter__(self) -> StopRequest:
        self._reader, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        # Handlers of Python have to exist for the socket to be told.
        self._handlers = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        threading.Thread(target=self._read, daemon=True).start()
        _active.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def release(self) -> None:
        """Signals do again what they did before the block: most likely, end this process."""
        if self not in _active:
            return
        _active.remove(self)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._sender.close()  # ends the thread

    def _handle(self, number: int, frame: object) -> None:
        self._note(number)

    def _note(self, number: int) -> None:
        if self.signal is None:
            self.signal = number

    def _read(self) -> None:
        called = False
        with self._reader:
            while numbers := self._reader.recv(16):
                for number in numbers:
                    if number in STOP_SIGNALS:
                        self._note(number)
                if self.signal is not None and not called:
                    called = True
                    self._on_request()


_active: list[StopRequest] = []


def _forget_in_child() -> None:
    """A forked process dies of these signals, as any other, and does not report its own to us."""
    if _active:
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_child)
