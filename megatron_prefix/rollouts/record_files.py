"""Files of records, read one record at a time from any position: JSON Lines and Parquet."""

from __future__ import annotations

import gzip
import json
import os
import reprlib
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from megatron_prefix.packages import needed_by

# Rows of a Parquet file that are Python objects at once, and bytes of a column read at once.
_PARQUET_ROWS = 64
_PARQUET_BUFFER_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 20
_JSON_LINES_ENDINGS = (".jsonl", ".jsonl.gz")
_PARQUET_ENDING = ".parquet"


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
    """Field names to plain Python values; what is null is left out."""
    source: str
    """Where it stands, as errors name it: lines count from 1, rows from 0."""
    end: FilePosition
    """Where the next one begins."""


class RecordFile(Protocol):
    """A file of records."""

    path: Path

    def records(self, start: FilePosition) -> Generator[Record, None, None]:
        """The records from `start` on.

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


def open_record_file(path: Path) -> RecordFile:
    """The reader of a file, by the end of its name.

    Raises:
        ValueError: see `fault_of_path`, or the package that reads it is not installed.
    """
    if fault := fault_of_path(path):
        raise ValueError(fault)
    is_parquet = path.name.lower().endswith(_PARQUET_ENDING)
    return ParquetFile(path) if is_parquet else JsonLinesFile(path)


def fault_of_path(path: Path) -> str | None:
    """Why there is no file of records at a path, as one line that names it; None if there is one.

    It is not opened.
    """
    if os.path.isdir(path):  # unlike its method, false where the user may not look
        return f"{path}: is a directory; name the files in it"
    if not os.path.isfile(path):
        searched = "" if path.is_absolute() else f" in {Path.cwd()}"
        return f"{path}: there is no such file{searched}"
    if not os.access(path, os.R_OK):
        return f"{path}: cannot be read by this user"
    if not path.name.lower().endswith((*_JSON_LINES_ENDINGS, _PARQUET_ENDING)):
        return f"{path}: unknown format; its name must end in .jsonl, .jsonl.gz or .parquet"
    return None


class JsonLinesFile:
    """One JSON object per line, in UTF-8; blank lines are passed over. May be gzipped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self, start: FilePosition) -> Generator[Record, None, None]:
        """The records of the lines from `start` on."""
        offset, number = start.offset, start.number
        with self._open() as file:
            for line in self._lines(file, start):
                offset += len(line)
                number += 1
                if line.strip():
                    source = f"{self.path}:{number}"
                    yield Record(
                        values=_parse_object(line, source),
                        source=source,
                        end=FilePosition(offset=offset, number=number),
                    )

    def can_continue_at(self, position: FilePosition) -> bool:
        """Whether a line begins at the offset, after so many lines."""
        left, number, last = position.offset, 0, b"\n"
        try:
            with self._open() as file:
                while left and (block := file.read(min(left, _BLOCK_BYTES))):
                    left -= len(block)
                    number += block.count(b"\n")
                    last = block[-1:]
        except (gzip.BadGzipFile, zlib.error, EOFError):
            return False
        return left == 0 and last == b"\n" and number == position.number

    def count(self) -> int:
        """The lines that are not blank."""
        with self._open() as file:
            return sum(bool(line.strip()) for line in self._lines(file, START))

    def _open(self) -> gzip.GzipFile | IO[bytes]:
        if self.path.name.lower().endswith(".gz"):
            return gzip.open(self.path, "rb")
        return self.path.open("rb")

    def _lines(self, file: gzip.GzipFile | IO[bytes], start: FilePosition) -> Iterator[bytes]:
        number = start.number
        try:
            file.seek(start.offset)
            while line := file.readline():
                yield line
                number += 1
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{self.path}:{number + 1}: not readable as gzip: {error}") from error


class ParquetFile:
    """One record per row. Needs pyarrow, which is imported when the first such file is opened."""

    def __init__(self, path: Path) -> None:
        with needed_by(f"{path}: reading Parquet", extra="train"):
            import pyarrow
            from pyarrow import parquet
        self.path = path
        self._open = parquet.ParquetFile
        self._errors = (pyarrow.ArrowException, OSError)

    def records(self, start: FilePosition) -> Generator[Record, None, None]:
        """The records of the rows from `start` on."""
        for row, values in self._rows(start.number):
            yield Record(
                values={name: value for name, value in values.items() if value is not None},
                source=f"{self.path}: row {row}",
                end=FilePosition(offset=row + 1, number=row + 1),
            )

    def can_continue_at(self, position: FilePosition) -> bool:
        """Whether there are so many rows."""
        try:
            with self._open(self.path) as file:
                return position.number <= file.metadata.num_rows
        except self._errors as error:
            raise ValueError(f"{self.path}: not readable as Parquet: {error}") from error

    def count(self) -> int:
        """The rows."""
        try:
            with self._open(self.path) as file:
                return file.metadata.num_rows
        except self._errors as error:
            raise ValueError(f"{self.path}: not readable as Parquet: {error}") from error

    def _rows(self, first: int) -> Iterator[tuple[int, dict[str, Any]]]:
        row = 0
        try:
            # Without the two options pyarrow reads a whole row group before the first row.
            with self._open(self.path, buffer_size=_PARQUET_BUFFER_BYTES, pre_buffer=False) as file:
                for index in range(file.num_row_groups):
                    num_rows = file.metadata.row_group(index).num_rows
                    if row + num_rows <= first:
                        row += num_rows
                        continue
                    for batch in file.iter_batches(
                        batch_size=_PARQUET_ROWS, row_groups=[index], use_threads=False
                    ):
                        skipped = min(max(first - row, 0), batch.num_rows)
                        row += skipped
                        for values in batch.slice(skipped).to_pylist():
                            yield row, values
                            row += 1
        except self._errors as error:
            raise ValueError(f"{self.path}: row {row}: not readable as Parquet: {error}") from error


def _parse_object(line: bytes, source: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig").rstrip("\r\n")
        values = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except json.JSONDecodeError as error:
        # Its own text says line 1, of what is one line of many.
        raise ValueError(
            f"{source}: not a JSON object: {error.msg} at column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not a JSON object: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source}: not a JSON object: {reprlib.repr(values)}")
    return {name: value for name, value in values.items() if value is not None}


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is there twice")
    return values
