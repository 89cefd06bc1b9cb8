"""Items from a list of record files, epoch after epoch, from a position that can be saved."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from megatron_prefix.rollouts.engine import EndOfRollouts
from megatron_prefix.rollouts.record import START, FilePosition, Record
from megatron_prefix.rollouts.record_files import identity_of, open_record_file

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

ItemReader = Callable[[Iterator[Record]], Iterable[tuple[Item, FilePosition]]]
"""Makes items of one file's records; with each comes the position after its last record."""


class HasPosition(Protocol):
    """Whatever is read from a position that can be saved."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        ...


@contextlib.contextmanager
def position_kept(source: HasPosition) -> Iterator[None]:
    """Within the block `source` is read; after an error it stands where it stood."""
    before = source.state_dict()
    try:
        yield
    except BaseException:
        source.load_state_dict(before)
        raise


@dataclass(frozen=True, kw_only=True)
class StreamPosition:
    """Where a stream is to be read on."""

    epoch: int = 0
    """Times that all files have been gone through."""
    file: int = 0
    """Index of the file that is being read."""
    within: FilePosition = START


class RecordStream(Generic[Item]):
    """Goes through files in their order, again and again; holds one item's records at a time.

    A `take` happens whole or not at all: after an error the stream stands where it stood.
    """

    def __init__(
        self,
        paths: Sequence[str | PathLike[str]],
        read_items: ItemReader[Item],
        *,
        epochs: int | None = None,
        as_arrays: bool = False,
    ) -> None:
        """Check the files' names; nothing is read yet.

        Args:
            paths: .jsonl, .jsonl.gz and .parquet files.
            read_items: makes items of a file's records; called anew for each file.
            epochs: how often to go through the files; None is without end.
            as_arrays: see `RecordFile.records`.

        Raises:
            ValueError: no paths, a file that is not there or of unknown format, or epochs below 1.
        """
        if not paths:
            raise ValueError("paths: there are none; name at least one file of rollouts")
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs={epochs}: set at least 1, or None to go on without end")
        self._files = [open_record_file(Path(path)) for path in paths]
        self._identities = [identity_of(file.path) for file in self._files]
        self._read_items = read_items
        self._epochs = epochs
        self._as_arrays = as_arrays
        self._position = StreamPosition()
        self._reader: Generator[tuple[Item, StreamPosition], None, None] | None = None

    @property
    def epoch(self) -> int:
        """Times that all files have been gone through."""
        return self._position.epoch

    def take(self, count: int) -> list[Item]:
        """The next `count` items.

        Raises:
            EndOfRollouts: fewer are left in the last epoch.
            ValueError: a record that is wrong, or files without a single item.
        """
        items: list[Item] = []
        self.take_each(count, items.append)
        return items

    def take_each(self, count: int, use: Callable[[Item], None]) -> None:
        """Have each of the next `count` items used as it is read, so that none has to be kept.

        Raises:
            EndOfRollouts: fewer are left in the last epoch.
            ValueError: a record that is wrong, or files without a single item; or of `use`.
        """
        if count < 1:
            raise ValueError(f"{count} groups were asked for; ask for at least 1")
        try:
            if self._reader is None:
                self._reader = self._read_from(self._position)
            taken, position = 0, self._position
            for item, end in itertools.islice(self._reader, count):
                use(item)
                taken, position = taken + 1, end
            if taken < count:
                raise EndOfRollouts(
                    f"the files of rollouts have been gone through (epochs={self._epochs}): "
                    f"{taken} groups are left, {count} were asked for"
                )
        except BaseException:
            self.close()
            raise
        self._position = position

    def each(self) -> Iterator[Item]:
        """The items of one epoch; the position stays.

        Raises:
            ValueError: a record that is wrong.
        """
        for file in self._files:
            with closing(file.records(START, as_arrays=self._as_arrays)) as records:
                yield from (item for item, _ in self._read_items(records))

    def state_dict(self) -> dict[str, Any]:
        """The position and the files that it is a position of, as plain values."""
        return {
            "epoch": self._position.epoch,
            "file": self._position.file,
            "offset": self._position.within.offset,
            "number": self._position.within.number,
            "files": [list(identity) for identity in self._identities],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the stream stood that gave `state`.

        Raises:
            ValueError: the files are not the ones of `state`, by name, or one of other contents
                (a later line may have been corrected) no longer has the position in it.
        """
        saved = [list(identity) for identity in state["files"]]
        position = StreamPosition(
            epoch=state["epoch"],
            file=state["file"],
            within=FilePosition(offset=state["offset"], number=state["number"]),
        )
        if saved != self._identities:
            same_names = [name for name, *_ in saved] == [name for name, *_ in self._identities]
            if not same_names or not self._files[position.file].can_continue_at(position.within):
                raise ValueError(
                    "the files of rollouts have changed: the saved position is one in "
                    f"{_listed(saved)}, but there are {_listed(self._identities)}; continue with "
                    "the same files, or start a new run"
                )
            logger.warning(
                "the files of rollouts have changed since, in size or contents, from %s to %s: "
                "continuing in %s after line or row %d",
                _listed(saved),
                _listed(self._identities),
                self._files[position.file].path,
                position.within.number,
            )
        self.close()
        self._position = position

    def close(self) -> None:
        """Close the file that is open; a later `take` opens it again where it stood."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def _read_from(
        self, position: StreamPosition
    ) -> Generator[tuple[Item, StreamPosition], None, None]:
        """Items from `position` on, each with the position after it."""
        while self._epochs is None or position.epoch < self._epochs:
            # From the start of an epoch something has to come, or this would never end.
            empty = position == StreamPosition(epoch=position.epoch)
            for index in range(position.file, len(self._files)):
                position = dataclasses.replace(
                    position,
                    file=index,
                    within=position.within if index == position.file else START,
                )
                file = self._files[index]
                with closing(file.records(position.within, as_arrays=self._as_arrays)) as records:
                    for item, end in self._read_items(records):
                        empty = False
                        yield item, dataclasses.replace(position, within=end)
            if empty:
                raise ValueError(f"no record in {', '.join(str(f.path) for f in self._files)}")
            position = StreamPosition(epoch=position.epoch + 1)


def _listed(identities: Sequence[Sequence[Any]]) -> str:
    return ", ".join(f"{name} ({size} bytes)" for name, size, *_ in identities)
