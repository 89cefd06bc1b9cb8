"""Rewards that read text: equal text, the right number, the right choice."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

from megatron_prefix.rollouts.text.numbers import find_number, number_of_answer

_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_LETTER = re.compile(r"(?<![A-Za-z0-9])\(?([A-Z])\)?(?![A-Za-z0-9'])")


TextRewardFunction = Callable[[str, str, Any], float]
"""How good a response is: of the texts of prompt and response, without special tokens, and the
record's answer."""


def exact_match(prompt: str, response: str, answer: Any) -> float:
    """1 if the response is the answer, up to white space, else 0."""
    return float(response.split() == _text_answer(answer).split())


def numeric(prompt: str, response: str, answer: Any) -> float:
    r"""1 if the response's number is the answer's, else 0, as in GSM8K (arXiv 2110.14168).

    The number is what the last `####` or `\boxed{}` gives, whichever comes last, else the last
    number of the text (see `numbers`). 3, 3.0, 3e0 and 6/2 are the same.

    Raises:
        ValueError: the answer is not plainly a number.
    """
    wanted = number_of_answer(answer)
    if wanted is None:
        raise ValueError(f"it compares with a number; answer is {reprlib.repr(answer)}")
    return float(find_number(response) == wanted)


def multiple_choice(prompt: str, response: str, answer: Any) -> float:
    r"""1 if the response chooses the answer, else 0.

    The answer is a letter ("B"), and the response's choice its last one that stands alone (in the
    last `\boxed{}`, if there is one); or it is {"choices": ["yes", "no"], "answer": "yes"}, and the
    choice is the one of these that the response names last, in upper or lower case.

    Raises:
        ValueError: the answer is neither.
    """
    if isinstance(answer, str) and re.fullmatch("[A-Z]", answer.strip()):
        boxed = _BOXED.findall(response)
        letters = _LETTER.findall(boxed[-1] if boxed else response)
        return float(bool(letters) and letters[-1] == answer.strip())
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or answer.get("answer") not in choices:
        raise ValueError(
            "it compares with a capital letter or with an answer out of choices; answer is "
            f"{reprlib.repr(answer)}"
        )
    return float(last_choice(response, [str(c) for c in choices]) == str(answer["answer"]))


def last_choice(text: str, choices: Sequence[str]) -> str | None:
    """The choice that a text names last; of two that end together, the longer one."""
    found: list[tuple[int, int, str]] = []
    for choice in choices:
        pattern = rf"(?<!\w){re.escape(choice)}(?!\w)"
        found += [
            (match.end(), len(choice), choice)
            for match in re.finditer(pattern, text, flags=re.IGNORECASE)
        ]
    return max(found)[2] if found else None


TEXT_REWARDS: dict[str, TextRewardFunction] = {
    function.__name__: function for function in (exact_match, numeric, multiple_choice)
}
"""The text rewards that have a name."""


def _text_answer(answer: Any) -> str:
    if not isinstance(answer, str):
        raise ValueError(f"it compares with the answer's text; answer is {reprlib.repr(answer)}")
    return answer
