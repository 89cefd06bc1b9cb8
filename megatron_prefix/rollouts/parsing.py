"""From the values of one record to its group, in arrays.

Here it is decided which fields there are, and whether they are lists, numbers or else, of the right
lengths. What a model can train on is decided by `validate_batch`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.rollouts.kinds import (
    FLAGS,
    KEYS,
    LOGPROBS,
    NUMBERS,
    TOKENS,
    Kind,
    Lists,
    offsets_of,
    read_item,
    read_list,
    read_lists,
)
from megatron_prefix.rollouts.record import START, Record, check_count
from megatron_prefix.rollouts.records import UNKNOWN, RolloutBatch, RolloutGroup
from megatron_prefix.rollouts.turns import at_turn_ends, turn_ends

_OF_TOKENS = {
    "loss_mask": (FLAGS, " values for a response of {} tokens"),
    "advantages": (NUMBERS, " for a response of {} tokens"),
    "old_logprobs": (LOGPROBS, " log-probabilities for a response of {} tokens"),
    "keys": (KEYS, " for {} tokens"),
}
"""Optional fields with a value for each token of a response, and how errors count them."""
_OF_TURNS = " for {} trained turns (runs of tokens that loss_mask has trained)"

ALL_OR_NONE = ("turn_rewards", *_OF_TOKENS, "finished", "prompt_keys")
"""Fields that all records of the responses of a group have, or none of them."""

FIELDS = (
    *("prompt", "messages", "responses", "rewards", "group", "response", "reward", "answer"),
    *ALL_OR_NONE,
    *("routed_experts", "prompt_positions", "positions"),
)


def group_id(record: Record) -> str | int | None:
    """The group that a record of one response belongs to; None for a record of a whole group.

    Raises:
        ValueError: the record is neither, is both, or has a field that seems to be misspelt.
    """
    check_names(record)
    values, where = record.values, f"{record.source}: "
    if record.is_whole:
        if "response" in values:
            raise ValueError(
                f"{where}response: a record has either responses (a whole group) or response (one "
                "of its group), not both"
            )
        return None
    if "response" not in values:
        raise ValueError(f"{where}responses: missing; a record needs them (or response)")
    if "group" not in values:
        raise ValueError(f"{where}group: missing; a record of one response names its group")
    found = values["group"]
    if type(found) not in (str, int):
        raise ValueError(f"{where}group: {reprlib.repr(found)} is not text or a whole number")
    return found


def read_group(record: Record) -> RolloutBatch:
    """The group of a record, or of the one response that it holds, as a batch.

    Rewards that it has not are those of its turns together, or 0.

    Raises:
        ValueError: a field is missing, not of its type or not of its length, naming it.
    """
    prompt = read_prompt(record)
    responses = _lists(record, "responses", TOKENS)
    if responses is None:
        raise ValueError(f"{record.source}: {record.own_name('responses')}: missing")
    count, offsets = len(responses), responses.offsets.astype(np.int64, copy=False)
    if count == 0:
        raise ValueError(f"{record.source}: responses: there are none; a group needs at least one")
    for r in np.flatnonzero(np.diff(offsets) == 0):
        raise ValueError(_empty(record.where("responses", r)))
    found = {
        name: _values(record, name, kind, offsets, counted)
        for name, (kind, counted) in _OF_TOKENS.items()
    }
    mask, turn_rewards = found["loss_mask"], None
    rewards = _of_responses(record, "rewards", NUMBERS, count)
    if "turn_rewards" in record.values:
        turns = np.searchsorted(turn_ends(mask, offsets), offsets)
        given = _values(record, "turn_rewards", NUMBERS, turns, _OF_TURNS)
        turn_rewards = at_turn_ends(given, mask, offsets)
        if rewards is None:
            # The same number whatever the order and the Python: its `sum` changed with 3.12.
            rewards = np.array([*map(math.fsum, np.split(given, turns[1:-1]))])
    finished = _of_responses(record, "finished", FLAGS, count)
    return RolloutBatch(
        prompt_tokens=prompt,
        prompt_offsets=offsets_of([len(prompt)]),
        group_offsets=offsets_of([count]),
        response_tokens=responses.values,
        response_offsets=offsets,
        rewards=np.zeros(count) if rewards is None else rewards,
        named_rewards=record.named_rewards,
        turn_rewards=turn_rewards,
        prompt_keys=_prompt_keys(record, len(prompt)),
        **found,
        finished=np.full(count, UNKNOWN, np.int8) if finished is None else finished.astype(np.int8),
        policy_versions=np.array([UNKNOWN]),
        answers=(record.values.get("answer"),),
        sources=(record.source,),
        records=(other_fields(record.values),),
    )


def batch_of_group(group: RolloutGroup) -> RolloutBatch:
    """A batch of the one group; see `read_group`."""
    batch = read_group(
        Record(
            values={n: v for n, v in vars(group).items() if n in FIELDS and v is not None},
            source=group.source,
            end=START,
            named_rewards={n: np.asarray(v, np.float64) for n, v in group.named_rewards.items()},
        )
    )
    changes: dict[str, Any] = {"records": (group.record,)}
    if group.policy_version is not None:
        changes["policy_versions"] = np.array([group.policy_version])
    if group.routes is not None:
        changes["routes"] = np.concatenate(group.routes)
    if group.position_shifts is not None:
        shifts = (group.prompt_position_shifts, np.concatenate(group.position_shifts))
        names = ("prompt_position_shifts", "position_shifts")
        changes |= {n: np.asarray(v, np.int32) for n, v in zip(names, shifts, strict=True)}
    return dataclasses.replace(batch, **changes)


def read_prompt(record: Record) -> NDArray[np.int32]:
    """The tokens of a record's prompt.

    Raises:
        ValueError: it is missing, or see `read_tokens`.
    """
    where = f"{record.source}: prompt"
    if "prompt" not in record.values:
        raise ValueError(f"{where}: missing")
    return read_tokens(record.values["prompt"], where)


def read_tokens(value: Any, where: str) -> NDArray[np.int32]:
    """A list of token ids.

    Raises:
        ValueError: it is empty, or none; it begins with `where`.
    """
    tokens = read_list(value, TOKENS, where)
    if len(tokens) == 0:
        raise ValueError(_empty(where))
    return tokens


def _empty(where: str) -> str:
    return f"{where}: is empty; it needs at least one token"


def _prompt_keys(record: Record, count: int) -> NDArray[np.int64] | None:
    if "prompt_keys" not in record.values:
        return None
    where = f"{record.source}: prompt_keys"
    keys = read_list(record.values["prompt_keys"], KEYS, where)
    if len(keys) != count:
        raise ValueError(f"{where}: {len(keys)} for {count} tokens; there must be one for each")
    return keys


def _of_responses(record: Record, field: str, kind: Kind, count: int) -> NDArray | None:
    """[R] a field with a value for each response."""
    name = record.own_name(field)
    if name not in record.values:
        return None
    value, where = record.values[name], f"{record.source}: {name}"
    if not record.is_whole:
        return read_item(value, kind, where)
    found = read_list(value, kind, where)
    check_count(where, len(found), count)
    return found


def _lists(record: Record, field: str, kind: Kind) -> Lists | None:
    """[R] a field with a list for each response."""
    name = record.own_name(field)
    if name not in record.values:
        return None
    value, where = record.values[name], f"{record.source}: {name}"
    if record.is_whole:
        return read_lists(value, kind, where)
    values = read_list(value, kind, where)
    return Lists(values=values, offsets=offsets_of([len(values)]))


def _values(
    record: Record, field: str, kind: Kind, offsets: NDArray[np.int64], counted: str
) -> NDArray | None:
    """The values of a field that has so many for each response as these offsets say."""
    found = _lists(record, field, kind)
    if found is None or np.array_equal(found.offsets, offsets):
        return None if found is None else found.values
    check_count(f"{record.source}: {field}", len(found), len(offsets) - 1)
    lengths, expected = np.diff(found.offsets), np.diff(offsets)
    r = int((lengths != expected).argmax())
    raise ValueError(
        f"{record.where(field, r)}: {lengths[r]}{counted.format(expected[r])}; there must be one "
        "for each"
    )


def other_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record that only a reward function reads."""
    return {name: value for name, value in values.items() if name not in FIELDS}


def check_names(record: Record) -> None:
    """Raise a ValueError for a field whose name is nearly that of a known one."""
    for name in record.values:
        meant = _misspelt(name)
        if meant is not None and meant not in record.values:
            raise ValueError(f"{record.source}: {name}: not a known field; is {meant} meant?")


@lru_cache(maxsize=1024)
def _misspelt(name: str) -> str | None:
    """The field that a name nearly is. One lost to a slip would change what is trained on."""
    # The last two say something of a record more often than they are slips.
    if name in FIELDS or name.lower() in ("key", "position"):
        return None
    close = difflib.get_close_matches(name.lower(), FIELDS, n=1, cutoff=0.85)
    return close[0] if close else None


def check_names_of_prompt(record: Record) -> None:
    """Check the names of a record that is to be sampled for.

    Raises:
        ValueError: see `check_names`, or it has keys.
    """
    check_names(record)
    if "prompt_keys" in record.values:
        raise ValueError(
            f"{record.source}: prompt_keys: no engine that samples looks at them; only finished "
            "rollouts (rollouts.engine: file) may have them; leave them out"
        )
