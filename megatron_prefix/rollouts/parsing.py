"""From the values of one record to its group.

Here it is decided which fields there are and whether they are lists, numbers or else; what a model
can train on is decided by `validate_group`. A record of a whole group whose fields are arrays
becomes a batch as it is. Where that cannot be done, `parse_group` reads the record's plain values,
or says what is wrong with them.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.rollouts.record import Lists, Record, plain_value
from megatron_prefix.rollouts.records import UNKNOWN, RolloutBatch, RolloutGroup, Tokens
from megatron_prefix.rollouts.turns import at_turn_ends, turn_ends

FIELDS = (
    "prompt",
    "messages",
    "responses",
    "rewards",
    "group",
    "response",
    "reward",
    "answer",
    "turn_rewards",
    "advantages",
    "old_logprobs",
    "loss_mask",
    "finished",
    "prompt_keys",
    "keys",
    "routed_experts",
    "prompt_positions",
    "positions",
)
_FLAT_NAMES = {"responses": "response", "rewards": "reward"}

Reader = Callable[[Any, str], Any]
"""Reads a value; an error begins with the text that is given, such as "a.jsonl:2: prompt"."""


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
        ValueError: the prompt is missing or no list, a field seems to be misspelt, or the prompt
            has keys, which no engine that samples looks at.
    """
    check_names(record)
    refuse_prompt_keys(record)
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
        "advantages": _lists_like(record, "advantages", responses, "iuf"),
        "old_logprobs": _lists_like(record, "old_logprobs", responses, "iuf"),
        "loss_mask": _lists_like(record, "loss_mask", responses, "b"),
        "prompt_keys": _as_int64(_items(record, "prompt_keys", len(prompt), "iu")),
        "keys": _as_int64(_lists_like(record, "keys", responses, "iu")),
    }
    found["turn_rewards"] = _turn_rewards(record, responses, found["loss_mask"])
    if any(found[name] is None and name in record.values for name in found):
        return None
    rewards, finished, old = found["rewards"], found["finished"], found["old_logprobs"]
    turn_rewards, advantages = found["turn_rewards"], found["advantages"]
    if advantages is not None and np.isnan(advantages).any():
        return None
    if rewards is None and turn_rewards is not None:
        of_responses = np.split(np.nan_to_num(turn_rewards), responses.offsets[1:-1])
        rewards = np.array([_total(values) for values in of_responses])
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
        named_rewards=record.named_rewards,
        old_logprobs=old,
        loss_mask=found["loss_mask"],
        turn_rewards=turn_rewards,
        advantages=None if advantages is None else advantages.astype(np.float64, copy=False),
        prompt_keys=found["prompt_keys"],
        keys=found["keys"],
        finished=finished.astype(np.int8),
        policy_versions=np.array([UNKNOWN]),
        answers=(record.values.get("answer"),),
        sources=(record.source,),
        records=(other_fields(record.values),),
    )


def parse_group(record: Record) -> RolloutGroup:
    """The group of a record that holds a whole one; rewards that it has not are those of its turns
    together, or 0.

    Raises:
        ValueError: a field is missing or not of its type, naming it.
    """
    return _parsed(record.plain(), lambda field: field, _each)


def parse_response(record: Record) -> RolloutGroup:
    """The group of one that a record of one response makes; see `parse_group`."""
    return _parsed(record, lambda field: _FLAT_NAMES.get(field, field), _single)


def _parsed(
    record: Record, name_of: Callable[[str], str], of_responses: Callable[[Reader], Reader]
) -> RolloutGroup:
    """The group of a record.

    Args:
        record: of any kind.
        name_of: the record's name of a field of responses.
        of_responses: from a reader of what one response has, a reader of such a field.
    """

    def optional(field: str, read: Reader) -> Any:
        return _optional(record, name_of(field), of_responses(read))

    responses = of_responses(_tokens)(*_required(record, name_of("responses")))
    turn_rewards = optional("turn_rewards", numbers)
    rewards = optional("rewards", number)
    if rewards is None:
        rewards = [0.0] * len(responses) if turn_rewards is None else [*map(_total, turn_rewards)]
    return RolloutGroup(
        prompt=_tokens(*_required(record, "prompt")),
        responses=responses,
        rewards=rewards,
        named_rewards=record.named_rewards,
        turn_rewards=turn_rewards,
        advantages=optional("advantages", numbers),
        old_logprobs=optional("old_logprobs", numbers),
        loss_mask=optional("loss_mask", _flags),
        prompt_keys=_optional(record, "prompt_keys", _keys),
        keys=optional("keys", _keys),
        finished=optional("finished", _flag),
        answer=record.values.get("answer"),
        record=other_fields(record.values),
        source=record.source,
    )


def other_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record that only a reward function reads."""
    return {name: value for name, value in values.items() if name not in FIELDS}


def response_field(field: str, response: int) -> str:
    """What a record of one response calls a field of `RolloutGroup` (see `FieldName`)."""
    return _FLAT_NAMES.get(field, field)


def check_names(record: Record) -> None:
    """Raise a ValueError for a field whose name is nearly that of a known one."""
    for name in record.values:
        meant = _misspelt(name)
        if meant is not None and meant not in record.values:
            raise ValueError(f"{record.source}: {name}: not a known field; is {meant} meant?")


def refuse_prompt_keys(record: Record) -> None:
    """Raise a ValueError for keys of a prompt that is to be sampled for."""
    if "prompt_keys" in record.values:
        raise ValueError(
            f"{record.source}: prompt_keys: no engine that samples looks at them; only finished "
            "rollouts (rollouts.engine: file) may have them; leave them out"
        )


@lru_cache(maxsize=1024)
def _misspelt(name: str) -> str | None:
    """The field that a name nearly is. One lost to a slip would change what is trained on."""
    # The last two say something of a record more often than they are slips.
    if name in FIELDS or name.lower() in ("key", "position"):
        return None
    close = difflib.get_close_matches(name.lower(), FIELDS, n=1, cutoff=0.85)
    return close[0] if close else None


def _required(record: Record, name: str) -> tuple[Any, str]:
    """A field's value, and how errors name it."""
    if name not in record.values:
        raise ValueError(f"{record.source}: {name}: missing")
    return record.values[name], f"{record.source}: {name}"


def _optional(record: Record, name: str, read: Reader) -> Any:
    if name not in record.values:
        return None
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


def _as_int64(keys: NDArray | None) -> NDArray[np.int64] | None:
    """An array of whole numbers of up to 64 bits with a sign; None where it is none."""
    if keys is None or keys.max(initial=0) > np.iinfo(np.int64).max:
        return None
    return keys.astype(np.int64, copy=False)


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


def _turn_rewards(
    record: Record, responses: Lists, loss_mask: NDArray[np.bool_] | None
) -> NDArray[np.float64] | None:
    """[T] as `RolloutBatch` has them; None where there are none, or not one for each turn."""
    value = record.values.get("turn_rewards")
    if not isinstance(value, Lists) or not _is_array(value.values, "iuf"):
        return None
    if np.diff(responses.offsets).min(initial=1) < 1 or np.isnan(value.values).any():
        return None
    turns = np.searchsorted(turn_ends(loss_mask, responses.offsets), responses.offsets)
    if not np.array_equal(value.offsets, turns):
        return None
    return at_turn_ends(value.values, loss_mask, responses.offsets)


def _total(values: Sequence[float] | NDArray) -> float:
    # The same number whatever the order and the Python: its `sum` of floats changed with 3.12.
    return math.fsum(values)


def _tokens(value: Any, where: str) -> Tokens:
    if _is_array(value, "iu"):
        return value
    value = plain_value(value)
    if type(value) is not list:
        raise ValueError(f"{where}: {reprlib.repr(value)} is not a list of token ids")
    return tuple(value)


def _list_of(read: Reader, value: Any, where: str) -> tuple[Any, ...]:
    value = plain_value(value)
    if type(value) is not list:
        raise ValueError(f"{where}: {reprlib.repr(value)} is not a list")
    return tuple(read(item, f"{where}[{i}]") for i, item in enumerate(value))


def _each(read: Reader) -> Reader:
    return lambda value, where: _list_of(read, value, where)


def _single(read: Reader) -> Reader:
    return lambda value, where: (read(value, where),)


def numbers(value: Any, where: str) -> Sequence[float] | NDArray:
    """A list of numbers, or an array of them.

    Raises:
        ValueError: it is none; the message begins with `where`.
    """
    return value if _is_array(value, "f") else _list_of(number, value, where)


def _keys(value: Any, where: str) -> Tokens:
    return value if _is_array(value, "i") else _list_of(_key, value, where)


def _key(value: Any, where: str) -> int:
    value = plain_value(value)
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise ValueError(f"{where}: {reprlib.repr(value)} is not a whole number of 64 bits")
    return value


def _flags(value: Any, where: str) -> Sequence[bool] | NDArray:
    return value if _is_array(value, "b") else _list_of(_flag, value, where)


def number(value: Any, where: str) -> float:
    """A number.

    Raises:
        ValueError: it is none; the message begins with `where`.
    """
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
