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

from megatron_prefix.rollouts.record import plain_value
from megatron_prefix.rollouts.records import RolloutBatch

FIELDS = ("prompt_positions", "positions")
"""Of a record: those of the prompt, and those of each response."""


def read_positions(value: Any, where: str, num_tokens: int) -> NDArray[np.int32]:
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


def with_positions(
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
