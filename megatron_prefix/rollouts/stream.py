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
from megatron_prefix.rollouts.record import START, FilePosition, Record, RecordFile
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
    offset: int = 0
    number: int = 0
    """Within the file, see `FilePosition`."""

    @property
    def within(self) -> FilePosition:
        """In the file."""
        return FilePosition(offset=self.offset, number=self.number)


def opened(
    paths: Sequence[str | PathLike[str]], epochs: int | None, *, files_of: str
) -> list[RecordFile]:
    """The readers of files that are gone through so many times.

    Raises:
        ValueError: no paths, a file that is not there or of unknown format, or epochs below 1.
    """
    if not paths:
        raise ValueError(f"paths: there are none; name at least one file of {files_of}")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs={epochs}: set at least 1, or None to go on without end")
    return [open_record_file(Path(path)) for path in paths]


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
        self._files = opened(paths, epochs, files_of="rollouts")
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
        return list(self.take_each(count))

    def take_each(self, count: int) -> Generator[Item, None, None]:
        """Each of the next `count` items as it is read, so that none has to be kept.

        They are taken when all have been gone through; a generator that is left before has to be
        closed. See `take` for errors.
        """
        if count < 1:
            raise ValueError(f"{count} groups were asked for; ask for at least 1")
        try:
            if self._reader is None:
                self._reader = self._read_from(self._position)
            taken, position = 0, self._position
            for item, end in itertools.islice(self._reader, count):
                yield item
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
        identities = [list(identity) for identity in self._identities]
        return {**dataclasses.asdict(self._position), "files": identities}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the stream stood that gave `state`.

        Raises:
            ValueError: the files are not the ones of `state`, by name, or one of other contents
                (a later line may have been corrected) no longer has the position in it.
        """
        saved = [list(identity) for identity in state["files"]]
        names = [field.name for field in dataclasses.fields(StreamPosition)]
        position = StreamPosition(**{name: state[name] for name in names})
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
                position.number,
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
                if index != position.file:
                    position = StreamPosition(epoch=position.epoch, file=index)
                file = self._files[index]
                with closing(file.records(position.within, as_arrays=self._as_arrays)) as records:
                    for item, end in self._read_items(records):
                        empty = False
                        yield item, dataclasses.replace(position, **vars(end))
            if empty:
                raise ValueError(f"no record in {', '.join(str(f.path) for f in self._files)}")
            position = StreamPosition(epoch=position.epoch + 1)


def _listed(identities: Sequence[Sequence[Any]]) -> str:
    return ", ".join(f"{name} ({size} bytes)" for name, size, *_ in identities)
