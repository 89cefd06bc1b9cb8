r"""The reward `math`: whether a response's answer is mathematically equal to the record's.

The library math-verify reads LaTeX and plain expressions and compares them by sympy. What a model
writes may take sympy for ever (`9^{9^{9^9}}`), so the reward runs in a process with a time limit
(see `user_process`) and a limit of memory, and is imported only there.
"""

from __future__ import annotations

import logging
import math
import reprlib
from typing import Any

from math_verify import parse, verify

from megatron_prefix.rollouts.memory_limit import limit_memory

limit_memory()
logging.getLogger("math_verify").setLevel(logging.ERROR)  # a time-out is a wrong answer

_BOXED = r"\boxed{"
_SECONDS = 2
"""The library's own limit, by SIGALRM: where it is enough, the process goes on."""


def math_equal(prompt: str, response: str, answer: Any) -> float:
    r"""1 if the response's last `\boxed{}`, else what follows its last `####`, else its last
    expression, is equal to the answer, else 0.

    Args:
        prompt: not read.
        response: text.
        answer: a number, or text that holds an expression: `3/4`, `\frac{3}{4}`, `x^2 + 1`, or a
            solution that ends in `#### 72` or `\boxed{72}`.

    Raises:
        ValueError: the answer is no mathematical expression.
    """
    text = _as_text(answer)
    if _marked(response) == _marked(text):  # also what is no expression to sympy, such as 3:4
        return 1.0
    wanted = _read(text, is_answer=True)
    if not any(not isinstance(found, str) for found in wanted):
        raise ValueError(f"it compares with an expression; answer is {reprlib.repr(answer)}")
    try:
        found = _read(response, is_answer=False)
        return float(verify(wanted, found, timeout_seconds=_SECONDS))
    except (MemoryError, RecursionError, OverflowError):
        return 0.0


def _as_text(answer: Any) -> str:
    is_number = isinstance(answer, (int, float)) and not isinstance(answer, bool)
    if is_number and math.isfinite(answer):
        return str(answer)
    if isinstance(answer, str) and answer.strip().lower().lstrip("+-") not in _NOT_NUMBERS:
        return answer
    raise ValueError(
        "it compares with a finite number, or with an expression as text; answer is "
        f"{reprlib.repr(answer)}"
    )


_NOT_NUMBERS = ("", "nan", "none", "null", "inf", "infinity")


def _read(text: str, *, is_answer: bool) -> list[Any]:
    """Expressions, and texts of such, that a text's answer can be read as."""
    is_boxed = _BOXED in text
    text = _marked(text).replace("\N{MINUS SIGN}", "-")
    if is_boxed or (is_answer and "$" not in text):
        text = f"{_BOXED}{text}}}"
    return parse(text, parsing_timeout=_SECONDS)


def _marked(text: str) -> str:
    r"""What stands in the last `\boxed{}`, else what follows the last `####`, else all.

    math-verify would take boxes that stand near each other together, as a set.
    """
    _, boxed, rest = text.rpartition(_BOXED)
    if not boxed:
        return text.rpartition("####")[2].strip()
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:i].strip()
    return rest.strip()
