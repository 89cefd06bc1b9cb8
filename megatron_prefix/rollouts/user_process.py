"""A user's function in processes of its own, with a time limit.

A call that hangs or crashes costs its own process, which is started anew, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import queue
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")

_START_TIMEOUT_S = 120.0
"""For importing the user's module, which may bring in large packages."""


class CallFailed(ValueError):
    """A call that gave nothing to go on with; the message says why."""


class CallEnded(CallFailed):
    """A call whose process crashed, or was ended since it took too long."""


class UserFunction:
    """Calls of a `module:function` in worker processes, from any thread."""

    def __init__(
        self,
        spec: str,
        *,
        processes: int,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the first process, which imports the function; others start when needed.

        Args:
            spec: module:function.
            processes: at most.
            timeout_s: of a call.
            environment: variables that the processes have beside those of this one.

        Raises:
            CallFailed: there is no such module or function, or the module does not import.
        """
        self.name = spec
        self._processes = processes
        self._timeout_s = timeout_s
        self._environment = environment or {}
        first = _Worker(spec, self._environment)
        self.parameters = first.parameters
        """Names of what the function takes by position."""
        # None stands for a process that is not there (any more).
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for worker in (*[None] * (processes - 1), first):
            self._idle.put(worker)

    def map(
        self, items: Iterable[Item], arguments: Callable[[Item], Sequence[Any]]
    ) -> list[dict[str, Any] | CallFailed]:
        """What a call about each item returned, or its error; calls run side by side.

        The arguments are made when a process is free: those of all items may be large.
        """

        def attempt(item: Item) -> dict[str, Any] | CallFailed:
            try:
                return self(*arguments(item))
            except CallFailed as error:
                return error

        with ThreadPoolExecutor(max_workers=self._processes) as threads:
            return list(threads.map(attempt, items))

    def __call__(self, *arguments: Any) -> dict[str, Any]:
        """What a call returned, as `result_of` has it; a `CallFailed` is raised where it raised,
        crashed or took too long."""
        worker = self._idle.get()
        try:
            worker = worker or _Worker(self.name, self._environment)
            what = f"the call (limit {self._timeout_s:g} s)"
            answer = worker.ask(arguments, self._timeout_s, what)
        except CallFailed:
            worker = None
            raise
        finally:
            self._idle.put(worker)
        if "error" in answer:
            raise CallFailed(f"failed: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the processes; a later call starts new ones."""
        for worker in [self._idle.get() for _ in range(self._processes)]:
            if worker is not None:
                worker.end()
            self._idle.put(None)


class _Worker:
    """One process, which runs one call at a time."""

    def __init__(self, spec: str, environment: Mapping[str, str]) -> None:
        module, _, function = spec.partition(":")
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        self._calls, theirs = multiprocessing.Pipe()
        with theirs:
            descriptor = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_prefix.rollouts.user_worker", str(descriptor)],
                stdin=subprocess.DEVNULL,
                stdout=2,
                env={**os.environ, **environment, "PYTHONPATH": root},
                pass_fds=[descriptor],
                # A group of its own, so that what the function has started ends with it.
                start_new_session=True,
            )
        self._kill = weakref.finalize(self, _kill_group, self._process.pid)
        path = [os.getcwd() if entry == "" else entry for entry in sys.path]
        message = {"path": path, "module": module, "function": function}
        answer = self.ask(message, _START_TIMEOUT_S, "importing it")
        if "error" in answer:
            self.end()
            raise CallFailed(answer["error"])
        self.parameters: list[str] = answer["parameters"]

    def ask(self, message: Any, timeout_s: float, what: str) -> dict[str, Any]:
        """The answer of the process, which is ended where it gives none."""
        try:
            self._calls.send_bytes(pickle.dumps(message))
            if self._calls.poll(timeout_s):
                # Not pickled, as what goes there: the function may be anybody's.
                return json.loads(self._calls.recv_bytes())
            self.end()
            raise CallEnded(f"{what} took too long; its process was ended")
        except (EOFError, OSError) as error:
            status = self._process.wait()
            self.end()
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise CallEnded(f"its process ended in {what} ({how})") from error

    def end(self) -> None:
        self._kill()
        self._process.wait()
        self._calls.close()


def _kill_group(process_group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process_group, signal.SIGKILL)
