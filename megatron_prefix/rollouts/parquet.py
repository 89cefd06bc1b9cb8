"""Records as the rows of Parquet files."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.packages import needed_by
from megatron_prefix.rollouts.kinds import Lists
from megatron_prefix.rollouts.record import ARRAY_FIELDS, FilePosition, Record

if TYPE_CHECKING:  # imported where the first file is opened
    import pyarrow

# Rows that are read at once, and bytes of a column.
_ROWS = 16
_BUFFER_BYTES = 1 << 20


class ParquetFile:
    """One record per row. Needs pyarrow, which is imported when the first such file is opened."""

    def __init__(self, path: Path) -> None:
        with needed_by(f"{path}: reading Parquet", extra="train"):
            import pyarrow
            from pyarrow import parquet
        self.path = path
        self._open = parquet.ParquetFile
        self._errors = (pyarrow.ArrowException, OSError)

    def records(
        self, start: FilePosition, *, as_arrays: bool = False
    ) -> Generator[Record, None, None]:
        """The records of the rows from `start` on."""
        for row, values in self._rows(start.number, as_arrays):
            yield Record(
                values={name: value for name, value in values.items() if value is not None},
                source=f"{self.path}: row {row}",
                end=FilePosition(offset=row + 1, number=row + 1),
            )

    def can_continue_at(self, position: FilePosition) -> bool:
        """Whether there are so many rows."""
        return position.number <= self.count()

    def count(self) -> int:
        """The rows."""
        try:
            with self._open(self.path) as file:
                return file.metadata.num_rows
        except self._errors as error:
            raise ValueError(f"{self.path}: not readable as Parquet: {error}") from error

    def _rows(self, first: int, as_arrays: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        row = 0
        try:
            # Without the two options pyarrow reads a whole row group before the first row.
            with self._open(self.path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
                for index in range(file.num_row_groups):
                    num_rows = file.metadata.row_group(index).num_rows
                    if row + num_rows <= first:
                        row += num_rows
                        continue
                    for batch in file.iter_batches(
                        batch_size=_ROWS, row_groups=[index], use_threads=False
                    ):
                        skipped = min(max(first - row, 0), batch.num_rows)
                        row += skipped
                        for values in _rows_of(batch.slice(skipped), as_arrays):
                            yield row, values
                            row += 1
        except self._errors as error:
            raise ValueError(f"{self.path}: row {row}: not readable as Parquet: {error}") from error


def _rows_of(batch: pyarrow.RecordBatch, as_arrays: bool) -> Iterable[dict[str, Any]]:
    """The values of each row, null included."""
    if not as_arrays:
        return batch.to_pylist()
    names = batch.schema.names
    columns = [
        _arrays_of(column) if name in ARRAY_FIELDS else (scalar.as_py() for scalar in column)
        for name, column in zip(names, batch.columns, strict=True)
    ]
    return (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))


def _arrays_of(column: pyarrow.Array) -> Iterator[Any]:
    """Each row's list as an array or as `Lists`; as plain values where it cannot be one."""
    lists = _as_lists(column)
    if lists is None:
        yield from (scalar.as_py() for scalar in column)
        return
    offsets, items = lists
    is_there = column.is_valid().to_numpy(zero_copy_only=False)
    for row in range(len(column)):
        yield _part(items, offsets[row], offsets[row + 1]) if is_there[row] else None


def _as_lists(column: pyarrow.Array) -> tuple[NDArray, NDArray | Lists] | None:
    """Where each list of a column begins in its items, and the items; None for another type.

    The items of lists of lists are `Lists` themselves.
    """
    from pyarrow import types

    if not (types.is_list(column.type) or types.is_large_list(column.type)):
        return None
    offsets = column.offsets.to_numpy()
    items = column.values
    # A null in a list makes it another list than its array would be.
    if items.null_count:
        return None
    if types.is_boolean(items.type):
        return offsets, items.to_numpy(zero_copy_only=False)
    if types.is_integer(items.type) or types.is_floating(items.type):
        return offsets, items.to_numpy()
    inner = _as_lists(items)
    if inner is None or isinstance(inner[1], Lists):
        return None
    return offsets, Lists(values=inner[1], offsets=inner[0])


def _part(items: NDArray | Lists, start: int, stop: int) -> NDArray | Lists:
    if isinstance(items, np.ndarray):
        return items[start:stop]
    offsets = items.offsets[start : stop + 1]
    return Lists(values=items.values[offsets[0] : offsets[-1]], offsets=offsets - offsets[0])
