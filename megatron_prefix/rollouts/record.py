"""One record of a file: its fields, and where it stands.

A field of numbers may come as an array, so that no Python object stands for a token; a list of such
lists comes as `Lists`. A field comes as plain Python values where its lists are not all of one type
of number, such as a list that holds a null.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Kind = Literal["tokens", "numbers", "flags"]

ARRAY_FIELDS: dict[str, Kind] = {
    "prompt": "tokens",
    "responses": "tokens",
    "response": "tokens",
    "rewards": "numbers",
    "turn_rewards": "numbers",
    "advantages": "numbers",
    "old_logprobs": "numbers",
    "loss_mask": "flags",
    "prompt_keys": "tokens",
    "keys": "tokens",
    "routed_experts": "tokens",
    "finished": "flags",
}
"""Fields that may come as arrays, and what is in them."""


@dataclass(frozen=True, kw_only=True)
class FilePosition:
    """Where a file is to be read on."""

    offset: int = 0
    """Bytes (uncompressed) of a JSON Lines file, rows of a Parquet file, that come before."""
    number: int = 0
    """Lines or rows that come before."""


START = FilePosition()


@dataclass(frozen=True, kw_only=True, eq=False)
class Lists:
    """Lists of numbers, one behind the other in one array."""

    values: NDArray
    offsets: NDArray[np.integer]
    """[lists + 1] where each list begins in `values`, and where the last one ends; from 0."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def plain(self) -> list[list[Any]]:
        """As Python's own lists and numbers."""
        values, ends = self.values.tolist(), self.offsets.tolist()
        return [values[ends[i] : ends[i + 1]] for i in range(len(self))]


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

    def plain(self) -> Record:
        """The same record with plain Python values in place of arrays."""
        values = {name: plain_value(value) for name, value in self.values.items()}
        return dataclasses.replace(self, values=values)


def value_at(values: Mapping[str, Any], name: str) -> Any:
    """The value of a field, whose dots may lead into objects; None where there is none."""
    if name in values:
        return values[name]
    value: Any = values
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def plain_value(value: Any) -> Any:
    """Python's own lists and numbers in place of an array or `Lists`; another value as it is."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.plain() if isinstance(value, Lists) else value


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
