"""Records as JSON Lines."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO

from megatron_prefix.rollouts.json_arrays import array_reader
from megatron_prefix.rollouts.json_object import parse_object
from megatron_prefix.rollouts.record import START, FilePosition, Record

_BLOCK_BYTES = 1 << 20


class JsonLinesFile:
    """One JSON object per line, in UTF-8; blank lines are passed over. May be gzipped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(
        self, start: FilePosition, *, as_arrays: bool = False
    ) -> Generator[Record, None, None]:
        """The records of the lines from `start` on."""
        offset, number = start.offset, start.number
        read_arrays = array_reader() if as_arrays else None
        with self._open() as file:
            for line in self._lines(file, start):
                offset += len(line)
                number += 1
                if line.strip():
                    source = f"{self.path}:{number}"
                    values = None if read_arrays is None else read_arrays(line)
                    yield Record(
                        values=parse_object(line, source) if values is None else values,
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
