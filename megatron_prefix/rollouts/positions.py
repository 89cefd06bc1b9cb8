"""Positions in records: time, height and width of each token, for a model with mRoPE.

A batch holds shifts, by which positions differ from a token's place in its sequence: text that no
image comes before has 0. So sequences without positions need none.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.rollouts.record import Record, of_each_response, plain_value
from megatron_prefix.rollouts.records import RolloutBatch

FIELDS = ("prompt_positions", "positions")
"""Of a record: those of the prompt, and those of each response."""


def with_positions_of_group(batch: RolloutBatch, record: Record) -> RolloutBatch:
    """The batch of a record that holds a whole group, with its positions.

    Raises:
        ValueError: see `_read`.
    """
    prompt = _read_optional(record, FIELDS[0], len(batch.prompt_tokens))
    lengths = np.diff(batch.response_offsets).tolist()
    found: list[NDArray | None] = [None] * len(lengths)
    if FIELDS[1] in record.values:
        where = f"{record.source}: {FIELDS[1]}"
        values = of_each_response(record.values[FIELDS[1]], where, len(lengths))
        found = [_read(value, f"{where}[{i}]", lengths[i]) for i, value in enumerate(values)]
    return _with_positions(batch, prompt, found)


class PositionsOfParts:
    """Positions of a group whose records are of one response each."""

    def __init__(self, name: str | int) -> None:
        """Of the group with this name; there are no records yet."""
        self._name = name
        self._first_source = ""
        self._prompt: NDArray[np.int32] | None = None
        self._responses: list[NDArray[np.int32] | None] = []

    def add(self, record: Record, prompt_length: int, response_length: int) -> None:
        """Those of the next record.

        Raises:
            ValueError: see `_read`; or the prompt's are not those of the first record.
        """
        prompt = _read_optional(record, FIELDS[0], prompt_length)
        if not self._responses:
            self._prompt, self._first_source = prompt, record.source
        elif (prompt is None) != (self._prompt is None) or not np.array_equal(prompt, self._prompt):
            raise ValueError(
                f"{record.source}: {FIELDS[0]}: group {self._name!r} of different prompts; their "
                f"positions differ from those of {self._first_source}"
            )
        self._responses.append(_read_optional(record, FIELDS[1], response_length))

    def joined(self, batch: RolloutBatch) -> RolloutBatch:
        """The batch of the group, with positions where a record has any."""
        if self._prompt is None and all(of is None for of in self._responses):
            return batch
        return _with_positions(batch, self._prompt, self._responses)


def _read_optional(record: Record, name: str, num_tokens: int) -> NDArray[np.int32] | None:
    if name not in record.values:
        return None
    return _read(record.values[name], f"{record.source}: {name}", num_tokens)


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


def _with_positions(
    batch: RolloutBatch,
    prompt: NDArray[np.int32] | None,
    responses: Sequence[NDArray[np.int32] | None],
) -> RolloutBatch:
    """The batch of one group with the positions of its tokens.

    Args:
        batch: of the group alone.
        prompt: [prompt tokens, 3]; None: all three are counted from 0.
        responses: [tokens, 3] of each; None: all three are counted on from the largest position of
            the prompt.
    """
    length = len(batch.prompt_tokens)
    places = np.arange(length + np.diff(batch.response_offsets).max(), dtype=np.int32)[:, None]
    shifts = np.zeros((length, 3), dtype=np.int32)
    if prompt is not None:
        shifts = prompt - places[:length]
    goes_on = 0 if prompt is None else int(prompt.max()) + 1 - length
    of_responses = [
        np.full((count, 3), goes_on, dtype=np.int32)
        if positions is None
        else positions - places[length : length + count]
        for count, positions in zip(
            np.diff(batch.response_offsets).tolist(), responses, strict=True
        )
    ]
    return dataclasses.replace(
        batch, prompt_position_shifts=shifts, position_shifts=np.concatenate(of_responses)
    )
