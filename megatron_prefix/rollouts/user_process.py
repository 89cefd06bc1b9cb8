"""A user's function in processes of its own, with a time limit.

A call that hangs or crashes costs its own process, which is started anew, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import selectors
import signal
import subprocess
import sys
import time
import weakref
from typing import Any

_START_TIMEOUT_S = 120.0
"""For importing the user's module, which may bring in large packages."""


class CallFailed(ValueError):
    """A call that gave nothing to go on with; the message says why."""


class CallEnded(CallFailed):
    """A call whose process crashed, or was ended since it took too long."""


class UserFunction:
    """Calls of a `module:function` in worker processes, from any thread."""

    def __init__(self, spec: str, *, processes: int, timeout_s: float) -> None:
        """Start the first process, which imports the function.

        Args:
            spec: module:function.
            processes: at most; they start when they are needed.
            timeout_s: of a call.

        Raises:
            CallFailed: there is no such module or function, or the module does not import.
        """
        self.name = spec
        self.processes = processes
        self._timeout_s = timeout_s
        # None stands for a process that is not there (any more).
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(processes - 1):
            self._idle.put(None)
        first = _Worker(spec)
        self._idle.put(first)
        self.parameters = first.parameters
        """Names of what the function takes by position."""

    def __call__(self, *arguments: Any) -> dict[str, Any]:
        """What a call returned: a number as `value`; else `kind` and `shown` for errors, and the
        results of a list's `items` or the `object` where JSON has it.

        Raises:
            CallFailed: it raised, crashed or took too long.
        """
        worker = self._idle.get()
        try:
            if worker is None:
                worker = _Worker(self.name)
            return worker.call(arguments, timeout_s=self._timeout_s)
        except CallFailed:
            if worker is not None and not worker.alive:
                worker = None
            raise
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the processes; a later call starts new ones."""
        for _ in range(self.processes):
            worker = self._idle.get()
            if worker is not None:
                worker.end()
        for _ in range(self.processes):
            self._idle.put(None)


class _Worker:
    """One process, which runs one call at a time."""

    def __init__(self, spec: str) -> None:
        module, _, function = spec.partition(":")
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_prefix.rollouts.user_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": root},
            # A group of its own, so that what the function has started ends with it.
            start_new_session=True,
        )
        self._kill = weakref.finalize(self, _kill_group, self._process.pid)
        self._buffer = b""
        path = [os.getcwd() if entry == "" else entry for entry in sys.path]
        message = {"path": path, "module": module, "function": function}
        try:
            answer = self._ask(message, time.monotonic() + _START_TIMEOUT_S, "importing it")
        except CallFailed:
            self.end()
            raise
        if "error" in answer:
            self.end()
            raise CallFailed(answer["error"])
        self.parameters: list[str] = answer["parameters"]

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def call(self, arguments: tuple[Any, ...], *, timeout_s: float) -> dict[str, Any]:
        answer = self._ask(
            arguments, time.monotonic() + timeout_s, f"the call (limit {timeout_s:g} s)"
        )
        if "error" in answer:
            raise CallFailed(f"failed: {answer['error']}")
        return answer

    def end(self) -> None:
        self._kill()
        self._process.wait()
        # What it has not read is still in the buffer, and cannot be flushed any more.
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()

    def _ask(self, message: Any, deadline: float, what: str) -> dict[str, Any]:
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
            line = self._read_line(deadline)
        except BrokenPipeError:
            line = b""
        if line is None:
            self.end()
            raise CallEnded(f"{what} took too long; its process was ended")
        if not line:
            status = self._process.wait()
            self.end()
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise CallEnded(f"its process ended in {what} ({how})")
        return json.loads(line)

    def _read_line(self, deadline: float) -> bytes | None:
        """One line; b"" where the process has ended, None at the deadline."""
        descriptor = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                block = os.read(descriptor, 1 << 16)
                if not block:
                    return b""
                self._buffer += block
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def _kill_group(process_group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process_group, signal.SIGKILL)
