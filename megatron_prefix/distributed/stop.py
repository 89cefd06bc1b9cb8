"""Signals that ask a run to stop: noticed at once, acted upon between two optimizer steps.

Slurm sends SIGTERM when it takes a node back, and SIGUSR1 (or what `--signal` says) ahead of a time
limit. Ctrl-C is SIGINT. torchrun passes SIGTERM and SIGINT on to its workers. A rank waits for most
of its time in collectives, during which Python runs no signal handler, so a thread reads the
signals from a socket.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_SAME_REQUEST_S = 2.0
"""A second SIGINT within this time is the first once more: the terminal has sent it to the whole
process group, and a launcher passes it on."""


class StopRequest:
    """Whether this process was asked to stop, within a `with` block of the main thread.

    Whoever presses Ctrl-C again does not want to wait: a later SIGINT is a KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """The first signal; None while there was none."""
        self._interrupted: float | None = None
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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(number)
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is None:
                self._interrupted = now
            elif now - self._interrupted > _SAME_REQUEST_S:
                signal.default_int_handler(number, frame)

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
