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
from megatron_prefix.rollouts.record import Record
from megatron_prefix.rollouts.records import RolloutBatch

FIELDS = ("prompt_positions", "positions")
"""Of a record: those of the prompt, and those of each response."""


def with_positions(batch: RolloutBatch, record: Record) -> RolloutBatch:
    """The batch of a record with its positions.

    Without those of the prompt, all three are counted from 0; without those of the responses they
    go on from the largest position of the prompt.

    Raises:
        ValueError: they are not three lists of a position for each token, naming them.
    """
    length, lengths = len(batch.prompt_tokens), np.diff(batch.response_offsets).tolist()
    places = np.arange(length + max(lengths), dtype=np.int32)[:, None]
    shifts, goes_on = np.zeros((length, 3), dtype=np.int32), 0
    if FIELDS[0] in record.values:
        where = f"{record.source}: {FIELDS[0]}"
        prompt = _read(record.values[FIELDS[0]], where, length)
        shifts, goes_on = prompt - places[:length], int(prompt.max()) + 1 - length
    of_responses = [np.full((count, 3), goes_on, dtype=np.int32) for count in lengths]
    if FIELDS[1] in record.values:
        values = record.of_each_response(FIELDS[1], len(lengths))
        of_responses = [
            _read(value, record.where(FIELDS[1], i), count) - places[length : length + count]
            for i, (value, count) in enumerate(zip(values, lengths, strict=True))
        ]
    return dataclasses.replace(
        batch, prompt_position_shifts=shifts, position_shifts=np.concatenate(of_responses)
    )


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
