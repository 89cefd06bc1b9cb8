"""A user's reward function in processes of its own, with a time limit.

One that hangs or crashes costs its own process, which is started anew, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pickle
import queue
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from megatron_prefix.rollouts.records import Tokens, plain_tokens
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer

if TYPE_CHECKING:  # reading rollouts needs NumPy only
    from megatron_prefix.config import RewardProcessConfig

logger = logging.getLogger(__name__)

Call = tuple[Tokens, Tokens, Any]
"""The prompt, the response and the answer that one call is about."""

_START_TIMEOUT_S = 120.0
"""For importing the user's module, which may bring in large packages."""


class RewardFailed(ValueError):
    """A call that gave no reward; the message says why."""


class ProcessReward:
    """A `RewardFunction` whose calls run in worker processes."""

    def __init__(
        self,
        spec: str,
        config: RewardProcessConfig,
        *,
        tokenizer: TextTokenizer | None = None,
    ) -> None:
        """Start the first process, which imports the function.

        Args:
            spec: module:function.
            config: how many processes, how long a call may take, what a failed one is worth.
            tokenizer: gives the function the text of prompt and response; without one it gets
                their token ids.

        Raises:
            ValueError: there is no such module or function, or the module does not import.
        """
        self.name = spec
        self._config = config
        self._tokenizer = tokenizer
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(config.processes - 1):
            self._idle.put(None)
        try:
            self._idle.put(_Worker(spec))
        except RewardFailed as error:
            raise ValueError(f"reward {spec!r}: {error}") from error
        self.failures = 0
        """Calls that were given `on_failure`."""

    def __call__(self, prompt: tuple[int, ...], response: tuple[int, ...], answer: Any) -> float:
        """The reward of one response.

        Raises:
            RewardFailed: the call failed, and `on_failure` is None.
        """
        read = self._tokenizer.read if self._tokenizer is not None else tuple
        arguments = (read(prompt), read(response), answer)
        # None stands for a process that is not there (any more).
        worker = self._idle.get()
        try:
            if worker is None:
                worker = _Worker(self.name)
            return worker.call(arguments, timeout_s=self._config.timeout_s)
        except RewardFailed as error:
            if worker is not None and not worker.alive:
                worker = None
            if self._config.on_failure is None:
                raise
            self.failures += 1
            on_failure = self._config.on_failure
            logger.warning("reward %s %s; it counts as %g", self.name, error, on_failure)
            return on_failure
        finally:
            self._idle.put(worker)

    def map(self, calls: Sequence[Call]) -> list[Any]:
        """Rewards of many responses, side by side; a failed one leaves its `RewardFailed`."""

        def attempt(call: Call) -> Any:
            prompt, response, answer = call
            try:
                # Only now: plain numbers of a whole batch would take gigabytes.
                return self(plain_tokens(prompt), plain_tokens(response), answer)
            except RewardFailed as error:
                return error

        with ThreadPoolExecutor(max_workers=self._config.processes) as threads:
            return list(threads.map(attempt, calls))

    def close(self) -> None:
        """End the processes; a later call starts new ones."""
        for _ in range(self._config.processes):
            worker = self._idle.get()
            if worker is not None:
                worker.end()
        for _ in range(self._config.processes):
            self._idle.put(None)


class _Worker:
    """One process, which runs one call at a time."""

    def __init__(self, spec: str) -> None:
        module, _, function = spec.partition(":")
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_prefix.rollouts.reward_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": root},
            # A group of its own, so that what the reward has started ends with it.
            start_new_session=True,
        )
        self._kill = weakref.finalize(self, _kill_group, self._process.pid)
        self._buffer = b""
        path = [os.getcwd() if entry == "" else entry for entry in sys.path]
        message = {"path": path, "module": module, "function": function}
        try:
            answer = self._ask(message, time.monotonic() + _START_TIMEOUT_S, "importing it")
        except RewardFailed:
            self.end()
            raise
        if "error" in answer:
            self.end()
            raise RewardFailed(answer["error"])

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def call(self, arguments: tuple[Any, ...], *, timeout_s: float) -> float:
        answer = self._ask(
            arguments, time.monotonic() + timeout_s, f"the call (limit {timeout_s:g} s)"
        )
        if "error" in answer:
            raise RewardFailed(f"failed: {answer['error']}")
        if "value" not in answer:
            raise RewardFailed(
                f"returned {answer['shown']}, a {answer['kind']}; it must return a float"
            )
        if not math.isfinite(answer["value"]):
            raise RewardFailed(f"returned {answer['value']}; it must return a finite number")
        return answer["value"]

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
            raise RewardFailed(f"{what} took too long; its process was ended")
        if not line:
            status = self._process.wait()
            self.end()
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise RewardFailed(f"its process ended in {what} ({how})")
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
