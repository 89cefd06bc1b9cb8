"""Rewards: functions of a prompt, a response and what the data says about the answer.

All of them see token ids. A reward that reads text brings its own tokenizer, as a function of the
user's, named `module:function`.
"""

from __future__ import annotations

import importlib
import reprlib
import sys
from collections.abc import Sequence
from functools import reduce
from typing import Any, Protocol

from megatron_prefix.rollouts.records import RolloutGroup


class RewardFunction(Protocol):
    """How good a response is. The same on every rank for the same arguments."""

    def __call__(self, prompt: tuple[int, ...], response: tuple[int, ...], answer: Any) -> float:
        """The reward, a finite number; `answer` is the record's, as JSON or Parquet gave it."""
        ...


def exact_match(prompt: tuple[int, ...], response: tuple[int, ...], answer: Any) -> float:
    """1 if the response is the answer, token for token (a stop token included), else 0."""
    return float(response == _answer_tokens(answer))


def token_match_fraction(prompt: tuple[int, ...], response: tuple[int, ...], answer: Any) -> float:
    """Positions at which response and answer agree, over the length of the longer one."""
    tokens = _answer_tokens(answer)
    agreeing = sum(a == b for a, b in zip(response, tokens, strict=False))
    return agreeing / max(len(response), len(tokens))


def contains_answer(prompt: tuple[int, ...], response: tuple[int, ...], answer: Any) -> float:
    """1 if the answer's tokens occur in the response one after another, else 0."""
    tokens = _answer_tokens(answer)
    starts = range(len(response) - len(tokens) + 1)
    return float(any(response[start : start + len(tokens)] == tokens for start in starts))


def ends_with_answer(prompt: tuple[int, ...], response: tuple[int, ...], answer: Any) -> float:
    """1 if the response ends with the answer's tokens (a stop token included), else 0."""
    tokens = _answer_tokens(answer)
    return float(response[-len(tokens) :] == tokens)


REWARDS: dict[str, RewardFunction] = {
    function.__name__: function
    for function in (exact_match, token_match_fraction, contains_answer, ends_with_answer)
}
"""The rewards that have a name."""


def load_reward(spec: str) -> RewardFunction:
    """The reward function of a name in `REWARDS`, or of `module:function`.

    The module is imported as Python finds it: from the folder of the script that runs (with
    `python -m`, the current one), PYTHONPATH and what is installed.

    Raises:
        ValueError: there is no such name, module or function, or the module does not import.
    """
    if spec in REWARDS:
        return REWARDS[spec]
    module_name, colon, path = spec.partition(":")
    if not (colon and module_name and path):
        raise ValueError(
            f"reward {spec!r}: name one of {', '.join(REWARDS)}, or a function of yours as "
            "module:function"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"reward {spec!r}: importing {module_name} failed: {_described(error)}"
        ) from error
    try:
        function = reduce(getattr, path.split("."), module)
    except AttributeError as error:
        raise ValueError(f"reward {spec!r}: {error}") from error
    if not callable(function):
        raise ValueError(f"reward {spec!r}: {reprlib.repr(function)} is not a function")
    return function


def compute_rewards(reward: RewardFunction, group: RolloutGroup) -> tuple[float, ...]:
    """The reward of each response of the group, whose own rewards are not looked at.

    Raises:
        ValueError: the function raised, or returned no finite float or int; the message names the
            group's source, the response and the function.
    """
    rewards = []
    for r, response in enumerate(group.responses):
        where = f"{group.source}: responses[{r}]: reward {_name(reward)}"
        try:
            value = reward(group.prompt, response, group.answer)
        except Exception as error:
            raise ValueError(f"{where} failed: {_described(error)}") from error
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(
                f"{where} returned {reprlib.repr(value)}, a {type(value).__name__}; it must "
                "return a float"
            )
        if not abs(value) <= sys.float_info.max:
            raise ValueError(f"{where} returned {value}; it must return a finite number")
        rewards.append(float(value))
    return tuple(rewards)


def _answer_tokens(answer: Any) -> tuple[int, ...]:
    if (
        not isinstance(answer, Sequence)
        or len(answer) == 0
        or any(type(token) is not int for token in answer)
    ):
        raise ValueError(
            f"it compares with the answer's token ids; answer is {reprlib.repr(answer)}"
        )
    return tuple(answer)


def _name(reward: RewardFunction) -> str:
    for name, function in REWARDS.items():
        if function is reward:
            return name
    module = getattr(reward, "__module__", type(reward).__module__)
    return f"{module}:{getattr(reward, '__qualname__', type(reward).__qualname__)}"


def _described(error: Exception) -> str:
    """One line about an error of somebody else's code; its traceback stays in the cause."""
    return f"{type(error).__name__}: {error}"
