"""From the values of one record to its group.

Here it is decided which fields there are and whether they are lists, numbers or else; what a model
can train on is decided by `validate_group`. A record of a whole group whose fields are arrays
becomes a batch as it is. Where that cannot be done, `parse_group` reads the record's plain values,
or says what is wrong with them.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.rollouts.record import Lists, Record, plain_value
from megatron_prefix.rollouts.records import UNKNOWN, RolloutBatch, RolloutGroup, Tokens

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
    "loss_mask",
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


def parse_prompt(record: Record) -> tuple[Tokens, Any]:
    """The prompt and the answer (None where there is none) of a record; its responses are not read.

    Raises:
        ValueError: the prompt is missing or no list, or a field seems to be misspelt.
    """
    check_names(record)
    return _tokens(*_required(record, "prompt")), record.values.get("answer")


def batch_of_arrays(record: Record) -> RolloutBatch | None:
    """A batch of the one group of a record that holds a whole one; rewards are 0 where it has none.

    Returns:
        None where a field is missing, is no array, or is not of its type or length.
    """
    responses = record.values.get("responses")
    if not isinstance(responses, Lists):
        return None
    prompt = _as_int32(record.values.get("prompt"))
    response_tokens = _as_int32(responses.values)
    if prompt is None or response_tokens is None:
        return None
    found = {
        "rewards": _items(record, "rewards", len(responses), "iuf"),
        "finished": _items(record, "finished", len(responses), "b"),
        "old_logprobs": _lists_like(record, "old_logprobs", responses, "iuf"),
        "loss_mask": _lists_like(record, "loss_mask", responses, "b"),
    }
    if any(found[name] is None and name in record.values for name in found):
        return None
    rewards, finished, old = found["rewards"], found["finished"], found["old_logprobs"]
    with np.errstate(over="ignore"):  # what is beyond 32 bits becomes infinite, and is refused
        old = None if old is None else old.astype(np.float32, copy=False)
    if finished is None:
        finished = np.full(len(responses), UNKNOWN)
    return RolloutBatch(
        prompt_tokens=prompt,
        prompt_offsets=np.array([0, len(prompt)]),
        group_offsets=np.array([0, len(responses)]),
        response_tokens=response_tokens,
        response_offsets=responses.offsets.astype(np.int64, copy=False),
        rewards=np.zeros(len(responses)) if rewards is None else rewards.astype(np.float64),
        old_logprobs=old,
        loss_mask=found["loss_mask"],
        finished=finished.astype(np.int8),
        policy_versions=np.array([UNKNOWN]),
        answers=(record.values.get("answer"),),
        sources=(record.source,),
    )


def parse_group(record: Record) -> RolloutGroup:
    """The group of a record that holds a whole one; rewards are 0 where it has none.

    Raises:
        ValueError: a field is missing or not of its type, naming it.
    """
    record = record.plain()
    responses = _list_of(_tokens, *_required(record, "responses"))
    return RolloutGroup(
        prompt=_tokens(*_required(record, "prompt")),
        responses=responses,
        rewards=_optional(record, "rewards", _numbers, default=(0.0,) * len(responses)),
        old_logprobs=_optional(record, "old_logprobs", _each(_numbers)),
        loss_mask=_optional(record, "loss_mask", _each(_flags)),
        finished=_optional(record, "finished", _flags),
        answer=record.values.get("answer"),
        source=record.source,
    )


def parse_response(record: Record) -> RolloutGroup:
    """The group of one that a record of one response makes; its reward is 0 where it has none.

    Raises:
        ValueError: a field is missing or not of its type, naming it.
    """
    old_logprobs = _optional(record, "old_logprobs", _numbers)
    loss_mask = _optional(record, "loss_mask", _flags)
    finished = _optional(record, "finished", _flag)
    return RolloutGroup(
        prompt=_tokens(*_required(record, "prompt")),
        responses=(_tokens(*_required(record, "response")),),
        rewards=(_optional(record, "reward", _number, default=0.0),),
        old_logprobs=None if old_logprobs is None else (old_logprobs,),
        loss_mask=None if loss_mask is None else (loss_mask,),
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


def _is_array(value: Any, kinds: str) -> bool:
    """Whether it is a NumPy array of one of these kinds of numbers."""
    return isinstance(value, np.ndarray) and value.dtype.kind in kinds


def _as_int32(tokens: Any) -> NDArray[np.int32] | None:
    """An array of whole numbers of up to 32 bits; None where it is none."""
    if not _is_array(tokens, "iu"):
        return None
    limits = np.iinfo(np.int32)
    if tokens.min(initial=0) < limits.min or tokens.max(initial=0) > limits.max:
        return None
    return tokens.astype(np.int32, copy=False)


def _items(record: Record, name: str, count: int, kinds: str) -> NDArray | None:
    """A field that is an array of so many items of these kinds; None where it is not."""
    value = record.values.get(name)
    return value if _is_array(value, kinds) and len(value) == count else None


def _lists_like(record: Record, name: str, responses: Lists, kinds: str) -> NDArray | None:
    """The items of a field that has one of these kinds for each token; None where it has not."""
    value = record.values.get(name)
    if not isinstance(value, Lists) or not _is_array(value.values, kinds):
        return None
    return value.values if np.array_equal(value.offsets, responses.offsets) else None


def _tokens(value: Any, where: str) -> Tokens:
    if _is_array(value, "iu"):
        return value
    value = plain_value(value)
    if type(value) is not list:
        raise ValueError(f"{where}: {reprlib.repr(value)} is not a list of token ids")
    return tuple(value)


def _list_of(read: Callable[[Any, str], Value], value: Any, where: str) -> tuple[Value, ...]:
    value = plain_value(value)
    if type(value) is not list:
        raise ValueError(f"{where}: {reprlib.repr(value)} is not a list")
    return tuple(read(item, f"{where}[{i}]") for i, item in enumerate(value))


def _each(read: Callable[[Any, str], Value]) -> Callable[[Any, str], tuple[Value, ...]]:
    return lambda value, where: _list_of(read, value, where)


def _numbers(value: Any, where: str) -> Sequence[float] | NDArray:
    return value if _is_array(value, "f") else _list_of(_number, value, where)


def _flags(value: Any, where: str) -> Sequence[bool] | NDArray:
    return value if _is_array(value, "b") else _list_of(_flag, value, where)


def _number(value: Any, where: str) -> float:
    value = plain_value(value)
    if type(value) not in (int, float):
        raise ValueError(f"{where}: {reprlib.repr(value)} is not a number")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{where}: {reprlib.repr(value)} is too large for a float") from error


def _flag(value: Any, where: str) -> bool:
    value = plain_value(value)
    if type(value) is not bool:
        raise ValueError(f"{where}: {reprlib.repr(value)} is not true or false")
    return value
