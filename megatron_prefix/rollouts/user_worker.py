"""The process in which a user's function runs; started by `user_process`, never imported by it.

Over what was its standard input come pickled calls, from the process that started it. Answers go
back as lines of JSON over what was its standard output; whatever the function prints goes to
standard error, and it has nothing to read. Imports nothing but the standard library, so that it
starts in a moment.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import reprlib
import signal
import sys
import threading
import time
from functools import reduce
from typing import Any, BinaryIO


def main() -> None:
    """Serve calls until the input ends."""
    # A scheduler that asks a run to stop asks all of its processes; the run still needs this one.
    # Not SIG_IGN, which what the function starts would inherit.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    calls = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    start = pickle.load(calls)
    sys.path[:] = start["path"]
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        module = importlib.import_module(start["module"])
    except BaseException as error:
        text = f"importing {start['module']} failed: {type(error).__name__}: {error}"
        _answer(answers, {"error": text})
        return
    try:
        function = reduce(getattr, start["function"].split("."), module)
    except AttributeError as error:
        _answer(answers, {"error": str(error)})
        return
    if not callable(function):
        _answer(answers, {"error": f"{reprlib.repr(function)} is not a function"})
        return
    _answer(answers, {"value": None})
    while True:
        try:
            arguments = pickle.load(calls)
        except EOFError:
            return
        try:
            value = function(*arguments)
        except Exception as error:
            _answer(answers, {"error": f"{type(error).__name__}: {error}"})
            continue
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            _answer(answers, {"value": _as_float(value)})
        else:
            _answer(answers, _described(value))


def _answer(answers: BinaryIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message).encode() + b"\n")
    answers.flush()


def _described(value: Any) -> dict[str, Any]:
    """What is no number: how errors show it, and the value itself where JSON has it."""
    shown = {"kind": type(value).__name__, "shown": reprlib.repr(value)}
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return shown
    return {**shown, "object": value}


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def _end_with_parent(parent: int) -> None:
    """A call that hangs would otherwise outlive a training that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main()
