"""The process in which a user's function runs; started by `user_process`.

Over what was its standard input come pickled calls, from the process that started it. Answers go
back as lines of JSON over what was its standard output; whatever the function prints goes to
standard error, and it has nothing to read. Imports nothing but the standard library, so that it
starts in a moment.
"""

from __future__ import annotations

import importlib
import inspect
import json
import numbers
import os
import pickle
import reprlib
import signal
import sys
import threading
import time
from decimal import Decimal
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
        if isinstance(error, ModuleNotFoundError):
            text += f"; looked for in {_places(start['path'])}"
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
    _answer(answers, {"parameters": _parameters(function)})
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
        _answer(answers, _result(value))


def _answer(answers: BinaryIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message).encode() + b"\n")
    answers.flush()


def _places(path: list[str]) -> str:
    """Where modules are looked for, without the folders of Python itself."""
    own = [entry for entry in path if not entry.startswith((sys.prefix, sys.base_prefix))]
    return ", ".join([*own, "the installed packages"])


def _parameters(function: Any) -> list[str]:
    """The names of what it takes by position."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions in C have none
        return []
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in found if parameter.kind in by_position]


def as_number(value: Any) -> float | None:
    """The number that a value is: of Python, NumPy or a tensor without dimensions, true and false
    as 1 and 0; None for anything else."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, (numbers.Real, Decimal)):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def _result(value: Any) -> dict[str, Any]:
    """A value as JSON can hold it: a number as `value`, a list as the results of its items."""
    number = as_number(value)
    if number is not None:
        return {"value": number}
    if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist"):
        value = value.tolist()
    shown = {"kind": type(value).__name__, "shown": reprlib.repr(value)}
    if isinstance(value, (list, tuple)):
        return {**shown, "items": [_result(item) for item in value]}
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return shown
    return {**shown, "object": value}


def _end_with_parent(parent: int) -> None:
    """A call that hangs would otherwise outlive a training that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main()
