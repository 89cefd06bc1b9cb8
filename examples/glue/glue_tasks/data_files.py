"""Rows of the data sets' own files: tab-separated ones (GLUE) and JSON Lines (SuperGLUE)."""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_BROKEN_LINES = 1e-3
"""Part of a file's lines that may be wrong where the official file has wrong lines."""

WITHHELD = "labels of test splits are withheld, so take the split to train or to validate on"


class DataError(ValueError):
    """A file that is not what its task says; the message names file, line and field."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a file, or one question of a line that holds several."""

    values: Mapping[str, Any]
    source: str
    """File and line, as errors name it."""

    def __getitem__(self, name: str) -> Any:
        """A field's value.

        Raises:
            DataError: there is no such field.
        """
        if name not in self.values:
            raise DataError(
                f"{self.source}: {name}: missing; the line has {', '.join(self.values)}"
            )
        return self.values[name]

    def text(self, name: str) -> str:
        """A field that is text and not empty.

        Raises:
            DataError: it is missing or something else.
        """
        value = self[name]
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{self.source}: {name}: {reprlib.repr(value)} is not text")
        return value

    def inner(self, name: str, *names: str) -> Row:
        """A field that is an object, as a row; further names lead on into it.

        Raises:
            DataError: it is missing or no object.
        """
        value = self[name]
        if not isinstance(value, dict):
            raise DataError(f"{self.source}: {name}: {reprlib.repr(value)} is not an object")
        row = Row(values=value, source=f"{self.source}: {name}")
        return row.inner(*names) if names else row

    def each(self, name: str) -> Iterator[Row]:
        """A field that is a list of objects, as rows.

        Raises:
            DataError: it is missing or something else.
        """
        value = self[name]
        if not isinstance(value, list):
            raise DataError(f"{self.source}: {name}: {reprlib.repr(value)} is not a list")
        for i, item in enumerate(value):
            yield Row(values={str(i): item}, source=f"{self.source}: {name}").inner(str(i))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and lines of a file; a line ends with a newline alone, as texts hold all others.

    Raises:
        DataError: the file is not there, or is no UTF-8.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number + 1}: no UTF-8 text: {error.reason}") from error


def tab_separated(
    path: Path,
    needed: Sequence[str],
    *,
    columns: Sequence[str] | None = None,
    has_broken_lines: bool = False,
) -> Iterator[Row]:
    """Rows of a tab-separated file; quotation marks are characters like others.

    Args:
        path: the file.
        needed: columns that are read.
        columns: names of a file without a header; None takes them from its first line.
        has_broken_lines: pass over a few lines that are wrong, and say how many.

    Raises:
        DataError: a column that is missing in the header, or empty or missing in a line.
    """
    lines = _lines(path)
    if columns is None:
        number, header = next(lines, (1, ""))
        columns = header.split("\t")
        for name in needed:
            if name not in columns:
                raise DataError(
                    f"{path}:{number}: {name}: there is no such column, the file has "
                    f"{', '.join(columns)}; {WITHHELD}"
                )
    broken: list[str] = []
    count = 0
    for number, line in lines:
        count += 1
        values = dict(zip(columns, line.split("\t"), strict=False))
        empty = next((name for name in needed if not values.get(name, "").strip()), None)
        if empty is None:
            yield Row(values=values, source=f"{path}:{number}")
            continue
        fault = (
            f"{path}:{number}: {empty}: is empty or missing; the line has {len(values)} of "
            f"{len(columns)} columns ({', '.join(columns)})"
        )
        if not has_broken_lines:
            raise DataError(fault)
        broken.append(fault)
    if len(broken) > _BROKEN_LINES * count:
        raise DataError(f"{broken[0]}; there are {len(broken)} such lines of {count}")
    if broken:
        logger.warning("passed over %d of %d lines; %s", len(broken), count, broken[0])


def json_lines(path: Path) -> Iterator[Row]:
    """Rows of a file with a JSON object in each line.

    Raises:
        DataError: a line that holds something else.
    """
    for number, line in _lines(path):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: no JSON: {error}") from error
        if not isinstance(values, dict):
            raise DataError(f"{path}:{number}: {reprlib.repr(values)} is not an object")
        yield Row(values=values, source=f"{path}:{number}")
