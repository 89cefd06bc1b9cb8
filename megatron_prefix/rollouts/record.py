"""One record of a file: its fields, and where it stands.

A field of numbers may come as an array, so that no Python object stands for a token; a list of such
lists comes as `Lists`. A field comes as plain Python values where its lists are not all of one type
of number, such as a list that holds a null.
"""

from __future__ import annotations

import reprlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.rollouts.kinds import FLAGS, KEYS, NUMBERS, TOKENS, Kind, Lists

ARRAY_FIELDS: dict[str, Kind] = {
    "prompt": TOKENS,
    "responses": TOKENS,
    "response": TOKENS,
    "rewards": NUMBERS,
    "turn_rewards": NUMBERS,
    "advantages": NUMBERS,
    "old_logprobs": NUMBERS,
    "loss_mask": FLAGS,
    "prompt_keys": KEYS,
    "keys": KEYS,
    "routed_experts": KEYS,
    "finished": FLAGS,
}
"""Fields that may come as arrays, and what is in them."""

_OF_ONE = {"responses": "response", "rewards": "reward"}


@dataclass(frozen=True, kw_only=True)
class FilePosition:
    """Where a file is to be read on."""

    offset: int = 0
    """Bytes (uncompressed) of a JSON Lines file, rows of a Parquet file, that come before."""
    number: int = 0
    """Lines or rows that come before."""


START = FilePosition()


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line or row."""

    values: dict[str, Any]
    """Field names to values; what is null is left out."""
    source: str
    """Where it stands, as errors name it: lines count from 1, rows from 0."""
    end: FilePosition
    """Where the next one begins."""
    named_rewards: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """[responses] each, where it gives rewards by name; `values` have their weighted sum."""


@dataclass(frozen=True, kw_only=True)
class GroupRecords:
    """The records of one group: one that holds all its responses, or one for each response."""

    records: Sequence[Record]

    @property
    def is_whole(self) -> bool:
        """Whether a record holds all responses."""
        return "responses" in self.records[0].values

    @property
    def source(self) -> str:
        """Where they stand: `file.jsonl:17` to `file.jsonl:20` are `file.jsonl:17-20`."""
        first, last = self.records[0].source, self.records[-1].source
        number = len(last) - len(last.rstrip("0123456789"))
        return first if first == last else f"{first}-{last[-number:]}"

    def own_name(self, field: str) -> str:
        """What the records call a field of responses."""
        return field if self.is_whole else _OF_ONE.get(field, field)

    def where(self, field: str, response: int) -> str:
        """How errors begin that are about a response's value of a field."""
        if self.is_whole:
            return f"{self.records[0].source}: {field}[{response}]"
        return f"{self.records[response].source}: {self.own_name(field)}"

    def given(self, field: str, count: int) -> list[Any]:
        """The values of a field of so many responses, as they are; None where there is none.

        Raises:
            ValueError: a record of a whole group has the field, and not one for each response.
        """
        if not self.is_whole:
            return [record.values.get(field) for record in self.records]
        (record,) = self.records
        value, where = record.values.get(field), f"{record.source}: {field}"
        if value is None:
            return [None] * count
        if isinstance(value, Lists):
            value = np.split(value.values, value.offsets[1:-1])
        if not isinstance(value, list):
            raise ValueError(
                f"{where}: {reprlib.repr(value)} is not a list of those of each response"
            )
        check_count(where, len(value), count)
        return value


def value_at(values: Mapping[str, Any], name: str) -> Any:
    """The value of a field, whose dots may lead into objects; None where there is none."""
    if name in values:
        return values[name]
    value: Any = values
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def check_count(where: str, found: int, count: int) -> None:
    """Raise a ValueError, which begins with `where`, unless there is one for each response."""
    if found != count:
        raise ValueError(f"{where}: {found} for {count} responses; there must be one for each")


class RecordFile(Protocol):
    """A file of records."""

    path: Path

    def records(
        self, start: FilePosition, *, as_arrays: bool = False
    ) -> Generator[Record, None, None]:
        """The records from `start` on.

        Args:
            start: where a record begins.
            as_arrays: whether `ARRAY_FIELDS` come as arrays, where they can.

        Raises:
            ValueError: what cannot be read as a record, naming the file and its line or row.
        """
        ...

    def can_continue_at(self, position: FilePosition) -> bool:
        """Whether as many lines or rows as `position` says come before it."""
        ...

    def count(self) -> int:
        """Its records; they are not parsed.

        Raises:
            ValueError: the file cannot be read, naming it.
        """
        ...
