"""From the values of one record to its group, in arrays.

Here it is decided which fields there are, and whether they are lists, numbers or else, of the right
lengths. What a model can train on is decided by `validate_batch`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
from collections.abc import Callable, Mapping
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
    read_item,
    read_list,
    read_lists,
)
from megatron_prefix.rollouts.record import START, GroupRecords, Record, check_count
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

_ALL_OR_NONE = ("turn_rewards", *_OF_TOKENS, "finished", "prompt_keys")
"""Fields that all records of the responses of a group have, or none of them."""

FIELDS = (
    *("prompt", "messages", "responses", "rewards", "group", "response", "reward", "answer"),
    *_ALL_OR_NONE,
    *("routed_experts", "prompt_positions", "positions"),
)


def group_id(record: Record) -> str | int | None:
    """The group that a record of one response belongs to; None for a record of a whole group.

    Raises:
        ValueError: the record is neither, is both, or has a field that seems to be misspelt.
    """
    check_names(record)
    values, where = record.values, f"{record.source}: "
    if "responses" in values:
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


def read_group(group: GroupRecords) -> RolloutBatch:
    """The group of these records, as a batch.

    Rewards that they have not are those of turns together, or 0.

    Raises:
        ValueError: a field is missing, not of its type or not of its length, naming it.
    """
    first = group.records[0]
    prompt = read_prompt(first)
    responses = _lists(group, "responses", TOKENS)
    count, offsets = len(responses), responses.offsets.astype(np.int64, copy=False)
    if count == 0:
        raise ValueError(f"{first.source}: responses: there are none; a group needs at least one")
    for r in np.flatnonzero(np.diff(offsets) == 0):
        raise ValueError(_empty(group.where("responses", r)))
    found = {
        name: _values(group, name, kind, offsets, counted)
        for name, (kind, counted) in _OF_TOKENS.items()
    }
    mask, turn_rewards = found["loss_mask"], None
    rewards = _of_responses(group, "rewards", NUMBERS, count)
    if any("turn_rewards" in record.values for record in group.records):
        turns = np.searchsorted(turn_ends(mask, offsets), offsets)
        given = _values(group, "turn_rewards", NUMBERS, turns, _OF_TURNS)
        turn_rewards = at_turn_ends(given, mask, offsets)
        if rewards is None:
            # The same number whatever the order and the Python: its `sum` changed with 3.12.
            rewards = np.array([*map(math.fsum, np.split(given, turns[1:-1]))])
    finished = _of_responses(group, "finished", FLAGS, count)
    return RolloutBatch(
        prompt_tokens=prompt,
        prompt_offsets=np.array([0, len(prompt)]),
        group_offsets=np.array([0, count]),
        response_tokens=responses.values,
        response_offsets=offsets,
        rewards=np.zeros(count) if rewards is None else rewards,
        named_rewards={
            name: np.concatenate([of.named_rewards.get(name, [np.nan]) for of in group.records])
            for name in dict.fromkeys(name for of in group.records for name in of.named_rewards)
        },
        turn_rewards=turn_rewards,
        prompt_keys=_prompt_keys(first, len(prompt)),
        **found,
        finished=np.full(count, UNKNOWN, np.int8) if finished is None else finished.astype(np.int8),
        policy_versions=np.array([UNKNOWN]),
        answers=(first.values.get("answer"),),
        sources=(group.source,),
        records=(other_fields(first.values),),
    )


def batch_of_group(group: RolloutGroup) -> RolloutBatch:
    """A batch of the one group; see `read_group`."""
    record = Record(
        values={n: v for n, v in vars(group).items() if n in FIELDS and v is not None},
        source=group.source,
        end=START,
        named_rewards={n: np.asarray(v, np.float64) for n, v in group.named_rewards.items()},
    )
    batch = read_group(GroupRecords(records=(record,)))
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
    tokens = read_list(value, where, TOKENS)
    if len(tokens) == 0:
        raise ValueError(_empty(where))
    return tokens


def _empty(where: str) -> str:
    return f"{where}: is empty; it needs at least one token"


def check_same_group(group: GroupRecords, batch: RolloutBatch) -> None:
    """Refuse records that are not of the group which the first one begins.

    Args:
        group: read already.
        batch: that `read_group` has read.

    Raises:
        ValueError: naming the record and a field.
    """
    first, *others = group.records
    prompt, keys = batch.prompt_tokens, batch.prompt_keys
    for record in others:
        where, name = record.source, f"group {record.values['group']!r}"
        ours = read_prompt(record)
        if not np.array_equal(ours, prompt):
            common = min(len(ours), len(prompt))
            differs = np.append(ours[:common] != prompt[:common], True)
            raise ValueError(
                f"{where}: prompt: {name} of different prompts; {first.source} begins it with "
                f"{len(prompt)} tokens, these are {len(ours)}, and they differ first at position "
                f"{differs.argmax()}"
            )
        if record.values.get("answer") != first.values.get("answer"):
            raise ValueError(
                f"{where}: answer: {name} of different answers; {first.source} begins it with "
                "another"
            )
        differs = _prompt_keys(record, len(ours)) != keys
        for field in _ALL_OR_NONE:
            if (field in record.values) != (field in first.values):
                raise ValueError(
                    f"{where}: {field}: of {name}, some records have it and some do not; "
                    f"{first.source} begins it; give it in all of them or in none"
                )
        if np.any(differs):
            raise ValueError(
                f"{where}: prompt_keys: {name} of different prompts; their keys differ from those "
                f"of {first.source} first at position {differs.argmax()}"
            )


def _prompt_keys(record: Record, count: int) -> NDArray[np.int64] | None:
    if "prompt_keys" not in record.values:
        return None
    where = f"{record.source}: prompt_keys"
    keys = read_list(record.values["prompt_keys"], where, KEYS)
    if len(keys) != count:
        raise ValueError(f"{where}: {len(keys)} for {count} tokens; there must be one for each")
    return keys


def _of_responses(group: GroupRecords, field: str, kind: Kind, count: int) -> NDArray | None:
    """[R] a field with a value for each response; 0 for records without it, None if none has it."""
    name = group.own_name(field)
    given = [(of.values.get(name), f"{of.source}: {name}") for of in group.records]
    if all(value is None for value, _ in given):
        return None
    if not group.is_whole:
        nothing = np.zeros(1, kind.dtype)
        return np.concatenate(
            [nothing if value is None else read_item(value, at, kind) for value, at in given]
        )
    ((value, where),) = given
    found = read_list(value, where, kind)
    check_count(where, len(found), count)
    return found


def _lists(
    group: GroupRecords, field: str, kind: Kind, default: Callable[[int], NDArray] | None = None
) -> Lists:
    """[R] a field with a list for each response, or its default for a response without."""
    name = group.own_name(field)
    given = [(of.values.get(name), f"{of.source}: {name}") for of in group.records]
    if group.is_whole:
        return read_lists(*given[0], kind)
    lists = [
        default(r) if value is None and default is not None else read_list(value, where, kind)
        for r, (value, where) in enumerate(given)
    ]
    return Lists.of(lists, kind.dtype)


def _values(
    group: GroupRecords, field: str, kind: Kind, offsets: NDArray[np.int64], counted: str
) -> NDArray | None:
    """The values of a field that has so many for each response as these offsets say."""
    if not any(field in record.values for record in group.records):
        return None

    def default(response: int) -> NDArray:
        return np.full(offsets[response + 1] - offsets[response], kind is FLAGS, kind.dtype)

    found = _lists(group, field, kind, default)
    if np.array_equal(found.offsets, offsets):
        return found.values
    lengths, expected = np.diff(found.offsets), np.diff(offsets)
    check_count(f"{group.source}: {field}", len(lengths), len(expected))
    r = int((lengths != expected).argmax())
    raise ValueError(
        f"{group.where(field, r)}: {lengths[r]}{counted.format(expected[r])}; there must be one "
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
