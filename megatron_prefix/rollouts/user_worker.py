"""The process in which a user's function runs; started by `user_process`.

Calls come pickled, from the process that started it, and answers go back as JSON, so that nothing
of the user's is unpickled there. Whatever the function prints goes to standard error, and it has
nothing to read. Imports nothing but the standard library, so that it starts in a moment.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import numbers
import os
import reprlib
import signal
import sys
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from functools import reduce
from multiprocessing.connection import Connection
from typing import Any


def main() -> None:
    """Serve calls until there are no more."""
    # A scheduler that asks a run to stop asks all of its processes; the run still needs this one.
    # Not SIG_IGN, which what the function starts would inherit.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    calls = Connection(int(sys.argv.pop()))
    os.set_inheritable(calls.fileno(), False)

    def answer(message: dict[str, Any]) -> None:
        calls.send_bytes(json.dumps(message).encode())

    start = calls.recv()
    sys.path[:] = start["path"]
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        function = _imported(**start)
    except Exception as error:
        answer({"error": str(error)})
        return
    answer({"parameters": _parameters(function)})
    while True:
        try:
            arguments = calls.recv()
        except EOFError:
            return
        try:
            answer(result_of(function(*arguments)))
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})


def _imported(module: str, function: str, path: list[str]) -> Callable[..., Any]:
    try:
        found = importlib.import_module(module)
    except BaseException as error:
        text = f"importing {module} failed: {type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError):
            text += f"; looked for in {_places(path)}"
        raise ImportError(text) from error
    found = reduce(getattr, function.split("."), found)
    if not callable(found):
        raise TypeError(f"{reprlib.repr(found)} is not a function")
    return found


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


def _as_number(value: Any) -> float | None:
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


def result_of(value: Any) -> dict[str, Any]:
    """What a function returned, as JSON can hold it: a number as `value`, a list's results as
    `items`, else as `object`; and how it looks (`shown`) and its `kind`, where it is no finite
    number."""
    number = _as_number(value)
    if number is not None and math.isfinite(number):
        return {"value": number}
    shown = {"kind": type(value).__name__, "shown": reprlib.repr(value)}
    if number is not None:
        return {**shown, "value": number}
    if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return {**shown, "items": [result_of(item) for item in value]}
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
