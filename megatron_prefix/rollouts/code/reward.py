"""The reward `code`: whether the Python program of a response passes the record's tests.

It is imported, and its programs run, in a process of its own (see `user_process`).
"""

from __future__ import annotations

import contextlib
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_prefix.rollouts.code.sandbox import NotIsolated, check_isolation, run_python

try:
    check_isolation()
except NotIsolated as error:
    raise NotIsolated(
        f"programs cannot be isolated here ({error}); allow unprivileged user namespaces, or name "
        "a reward function of yours that asks a service to run them"
    ) from error

_SECONDS = 5
"""Of each test."""
_BLOCK = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
_PYTHON = ("python", "py", "python3")


def passes_tests(prompt: str, response: str, answer: Any) -> float:
    """1 if the response's last block of Python passes all tests.

    Without a block that is named so, it is the last block without a name, and without a block all
    of the response.

    Args:
        prompt: not read.
        response: text.
        answer: statements of Python, which raise where the program is wrong, as text or as a list
            of texts, each of which is run behind the program; or {"inputs": [...], "outputs":
            [...]}, texts that the program reads and prints, also as the JSON text of that.

    Raises:
        ValueError: the answer has no tests.
    """
    tests, pairs = _tests(answer)
    code = _program(response)
    if not code.strip():
        return 0.0
    for test in tests:
        if not run_python(code, tests=test, seconds=_SECONDS).completed:
            return 0.0
    for given, wanted in pairs:
        ran = run_python(code, stdin=given, seconds=_SECONDS)
        if not ran.succeeded or _lines(ran.output) != _lines(wanted):
            return 0.0
    return 1.0


def _program(response: str) -> str:
    blocks = [(name.strip().lower(), code) for name, code in _BLOCK.findall(response)]
    for names in (_PYTHON, ("",)):  # plain fences often show what a program prints
        for name, code in reversed(blocks):
            if name in names:
                return code
    return "" if "```" in response else response


def _tests(answer: Any) -> tuple[list[str], list[tuple[str, str]]]:
    """Statements, and pairs of what is read and what is to be printed."""
    if isinstance(answer, str) and answer.lstrip().startswith(("{", "[")):
        with contextlib.suppress(json.JSONDecodeError):  # statements may begin so
            answer = json.loads(answer)
    if isinstance(answer, str) and answer.strip():
        return [answer], []
    if _are_texts(answer):
        return list(answer), []
    if isinstance(answer, Mapping) and set(answer) == {"inputs", "outputs"}:
        inputs, outputs = answer["inputs"], answer["outputs"]
        if _are_texts(inputs) and _are_texts(outputs) and len(inputs) == len(outputs):
            return [], list(zip(inputs, outputs, strict=True))
    raise ValueError(
        "it runs tests: statements as text or a list of texts, or as many texts of inputs as of "
        f"outputs; answer is {reprlib.repr(answer)}"
    )


def _are_texts(values: Any) -> bool:
    is_list = isinstance(values, Sequence) and not isinstance(values, (str, bytes))
    return is_list and len(values) > 0 and all(isinstance(value, str) for value in values)


def _lines(text: str) -> list[str]:
    """Lines without the blanks at their ends, and without empty ones at the text's end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
