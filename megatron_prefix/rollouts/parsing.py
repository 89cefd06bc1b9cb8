"""From the plain values of one record to a `RolloutGroup`.

Here it is decided which fields there are and whether they are lists, numbers or else; what a model
can train on is decided by `validate_group`.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from megatron_prefix.rollouts.record_files import Record
from megatron_prefix.rollouts.records import RolloutGroup

_FIELDS = (
    "prompt",
    "messages",
    "responses",
    "rewards",
    "group",
    "response",
    "reward",
    "answer",
    "old_logprobs",
    "finished",
)
_FLAT_NAMES = {"responses": "response", "rewards": "reward"}

Value = TypeVar("Value")


def group_id(record: Record) -> str | int | None:
    """The group that a record of one response belongs to; None for a record of a whole group.

    Raises:
        ValueError: the record is neither, is both, or has a field that seems to be misspelt.
    """
    check_names(record)
    values = record.values
    if "responses" in values and "response" in values:
        raise ValueError(
            f"{record.source}: response: a record has either responses (a whole group) or "
            "response (one of its group), not both"
        )
    if "responses" in values:
        return None
    if "response" not in values:
        raise ValueError(f"{record.source}: responses: missing; a record needs them (or response)")
    if "group" not in values:
        raise ValueError(
            f"{record.source}: group: missing; a record of one response names its group"
        )
    found = values["group"]
    if type(found) not in (str, int):
        raise ValueError(
            f"{record.source}: group: {reprlib.repr(found)} is not text or a whole number"
        )
    return found


def parse_prompt(record: Record) -> tuple[tuple[int, ...], Any]:
    """The prompt and the answer (None where there is none) of a record; its responses are not read.

    Raises:
        ValueError: the prompt is missing or no list, or a field seems to be misspelt.
    """
    check_names(record)
    return _tokens(*_required(record, "prompt")), record.values.get("answer")


def parse_group(record: Record) -> RolloutGroup:
    """The group of a record that holds a whole one; rewards are 0 where it has none.

    Raises:
        ValueError: a field is missing or not of its type, naming it.
    """
    responses = _list_of(_tokens, *_required(record, "responses"))
    return RolloutGroup(
        prompt=_tokens(*_required(record, "prompt")),
        responses=responses,
        rewards=_optional(record, "rewards", _numbers, default=(0.0,) * len(responses)),
        old_logprobs=_optional(record, "old_logprobs", _each(_numbers)),
        finished=_optional(record, "finished", _each(_flag)),
        answer=record.values.get("answer"),
        source=record.source,
    )


def parse_response(record: Record) -> RolloutGroup:
    """The group of one that a record of one response makes; its reward is 0 where it has none.

    Raises:
        ValueError: a field is missing or not of its type, naming it.
    """
    old_logprobs = _optional(record, "old_logprobs", _numbers)
    finished = _optional(record, "finished", _flag)
    return RolloutGroup(
        prompt=_tokens(*_required(record, "prompt")),
        responses=(_tokens(*_required(record, "response")),),
        rewards=(_optional(record, "reward", _number, default=0.0),),
        old_logprobs=None if old_logprobs is None else (old_logprobs,),
        finished=None if finished is None else (finished,),
        answer=record.values.get("answer"),
        source=record.source,
    )


def response_field(field: str, response: int) -> str:
    """What a record of one response calls a field of `RolloutGroup` (see `FieldName`)."""
    return _FLAT_NAMES.get(field, field)


def check_names(record: Record) -> None:
    """Raise a ValueError for a field whose name is nearly that of a known one."""
    for name in record.values:
        meant = _misspelt(name)
        if meant is not None and meant not in record.values:
            raise ValueError(f"{record.source}: {name}: not a known field; is {meant} meant?")


@lru_cache(maxsize=1024)
def _misspelt(name: str) -> str | None:
    """The field that a name nearly is. One lost to a slip would change what is trained on."""
    if name in _FIELDS:
        return None
    close = difflib.get_close_matches(name.lower(), _FIELDS, n=1, cutoff=0.85)
    return close[0] if close else None


def _required(record: Record, name: str) -> tuple[Any, str]:
    """A field's value, and how errors name it."""
    if name not in record.values:
        raise ValueError(f"{record.source}: {name}: missing")
    return record.values[name], f"{record.source}: {name}"


def _optional(
    record: Record, name: str, read: Callable[[Any, str], Value], *, default: Any = None
) -> Any:
    if name not in record.values:
        return default
    return read(record.values[name], f"{record.source}: {name}")


def _tokens(value: Any, where: str) -> tuple[Any, ...]:
    if type(value) is not list:
        raise ValueError(f"{where}: {reprlib.repr(value)} is not a list of token ids")
    return tuple(value)


def _list_of(read: Callable[[Any, str], Value], value: Any, where: str) -> tuple[Value, ...]:
    if type(value) is not list:
        raise ValueError(f"{where}: {reprlib.repr(value)} is not a list")
    return tuple(read(item, f"{where}[{i}]") for i, item in enumerate(value))


def _each(read: Callable[[Any, str], Value]) -> Callable[[Any, str], tuple[Value, ...]]:
    return lambda value, where: _list_of(read, value, where)


def _numbers(value: Any, where: str) -> tuple[float, ...]:
    return _list_of(_number, value, where)


def _number(value: Any, where: str) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{where}: {reprlib.repr(value)} is not a number")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{where}: {reprlib.repr(value)} is too large for a float") from error


def _flag(value: Any, where: str) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{where}: {reprlib.repr(value)} is not true or false")
    return value
