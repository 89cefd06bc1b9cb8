"""Positions in records: time, height and width of each token, for a model with mRoPE.

A batch holds shifts, by which positions differ from a token's place in its sequence: text that no
image comes before has 0. So sequences without positions need none.
"""

from __future__ import annotations

import dataclasses
import reprlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.rollouts.kinds import plain_value
from megatron_prefix.rollouts.record import GroupRecords, Record
from megatron_prefix.rollouts.records import RolloutBatch

FIELDS = ("prompt_positions", "positions")
"""Of a record: those of the prompt, and those of each response."""


def with_positions(batch: RolloutBatch, group: GroupRecords) -> RolloutBatch:
    """The batch of a group with the positions that its records have.

    Without those of the prompt, all three are counted from 0; without those of a response they go
    on from the largest position of the prompt.

    Raises:
        ValueError: they are not three lists of a position for each token, naming them.
    """
    length, lengths = len(batch.prompt_tokens), np.diff(batch.response_offsets).tolist()
    places = np.arange(length + max(lengths), dtype=np.int32)[:, None]
    first, *others = (_of_prompt(record, length) for record in group.records)
    for record, of_prompt in zip(group.records[1:], others, strict=True):
        if not np.array_equal(of_prompt, first):
            raise ValueError(
                f"{record.source}: {FIELDS[0]}: group {record.values['group']!r} of different "
                f"prompts; their positions differ from those of {group.records[0].source}"
            )
    goes_on = int(first.max()) + 1 - length
    of_responses = [
        np.full((count, 3), goes_on, dtype=np.int32)
        if value is None
        else _read(value, group.where(FIELDS[1], i), count) - places[length : length + count]
        for i, (value, count) in enumerate(
            zip(group.given(FIELDS[1], len(lengths)), lengths, strict=True)
        )
    ]
    return dataclasses.replace(
        batch,
        prompt_position_shifts=first - places[:length],
        position_shifts=np.concatenate(of_responses),
    )


def _of_prompt(record: Record, length: int) -> NDArray[np.int32]:
    """[length, 3] as a record has them, or else counted from 0."""
    if FIELDS[0] not in record.values:
        return np.repeat(np.arange(length, dtype=np.int32)[:, None], 3, axis=1)
    return _read(record.values[FIELDS[0]], f"{record.source}: {FIELDS[0]}", length)


def _read(value: Any, where: str, num_tokens: int) -> NDArray[np.int32]:
    """[num_tokens, 3] of three lists in a record: time, height and width of each token.

    Raises:
        ValueError: they are not three lists of so many positions; it begins with `where`.
    """
    try:
        found = np.asarray(plain_value(value))
    except ValueError:
        found = np.zeros(0)
    if found.shape != (3, num_tokens):
        raise ValueError(
            f"{where}: {reprlib.repr(plain_value(value))} is not three lists (time, height, width) "
            f"of a position for each of {num_tokens} tokens"
        )
    largest = np.iinfo(np.int32).max
    if found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= largest:
        raise ValueError(f"{where}: positions are whole numbers from 0 on, less than {largest}")
    return np.ascontiguousarray(found.T, dtype=np.int32)
