"""What a response answers, and the reward for it."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping
from typing import Any

from megatron_prefix.rollouts.text.rewards import find_number, last_choice

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def predicted(response: str, answer: Mapping[str, Any]) -> str | float | None:
    """What a response answers.

    Args:
        response: its text.
        answer: of the example (see `Example.answer`).

    Returns:
        The number of a response to a question for a score, within its range. Of a response to a
        question for a name, the last one that it names, else all of its text. Otherwise the last
        choice that it names. None where there is none.
    """
    if "number" in answer:
        number = find_number(response)
        return None if number is None else min(max(float(number), 0.0), answer["largest"])
    chosen = last_choice(response, answer["choices"])
    return response.strip() if chosen is None and "answers" in answer else chosen


def reward(prompt: str, response: str, answer: Any) -> float:
    """1 for the right answer, else 0; for a score 1 less the error's part of the range."""
    found = predicted(response, answer)
    if "number" in answer:
        if found is None:
            return 0.0
        return 1.0 - abs(float(found) - answer["number"]) / answer["largest"]
    if "answers" in answer:
        return float(exact_match(str(found), answer["answers"]))
    return float(found == answer["answer"])


def exact_match(found: str, answers: list[str]) -> bool:
    """Whether a name is one of the answers, as SQuAD compares (arXiv 1606.05250)."""
    return any(_words(found) == _words(answer) for answer in answers)


def token_f1(found: str, answers: list[str]) -> float:
    """SQuAD's F1 of the words of a name, against the answer that it fits best."""
    return max(_f1(_words(found), _words(answer)) for answer in answers)


def _f1(found: list[str], answer: list[str]) -> float:
    common = sum((Counter(found) & Counter(answer)).values())
    return 2 * common / (len(found) + len(answer)) if common else 0.0


def _words(text: str) -> list[str]:
    """Words in lower case without articles and punctuation."""
    return _ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split()
