"""Distributed checkpoints (torch_dist), written and read piece by piece, without process groups.

The files are torch's own: its writer and reader move the data. Only the plan is made here, since a
plan of Megatron's needs the whole model in memory. A piece is one layer's (and expert's) parameter.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_prefix.checkpoints.torch_dist import contents, read_metadata
from megatron_prefix.conversion.errors import ConversionError
from megatron_prefix.system_errors import system_error

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a stored tensor: whole in all axes but the leading ones."""

    key: str
    index: Shape
    """In the leading axes (layer, expert)."""
    leading: Shape
    """Sizes of the leading axes."""
    shape: Shape
    dtype: torch.dtype
    make: Callable[[], Tensor] = field(repr=False)
    """Its data, called when it is written; not kept."""

    @property
    def offsets(self) -> Shape:
        """Of the piece in the whole tensor."""
        return (*self.index, *(0 for _ in self.shape))

    @property
    def sizes(self) -> Shape:
        """Of the piece, with leading axes of size 1."""
        return (*(1 for _ in self.leading), *self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_checkpoint(
    folder: Path, pieces: Sequence[Piece], empty_objects: Sequence[str], *, max_file_bytes: int
) -> None:
    """Write a checkpoint that Megatron loads at any layout.

    Args:
        folder: exists, and is empty.
        pieces: every part of every tensor, once; written in this order.
        empty_objects: keys of objects that are there but hold nothing.
        max_file_bytes: a new file begins before it is exceeded.

    Raises:
        OSError: a file cannot be written.
    """
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=False, thread_count=1)
    planner = _LazySavePlanner(pieces)
    plans = writer.prepare_global_plan(
        [
            SavePlan([planner.item(number) for number in numbers], planner_data={})
            for numbers in _files(pieces, max_file_bytes)
        ]
    )
    objects = [_object_item(key) for key in empty_objects]
    results = []
    for number, plan in enumerate(plans):
        if number == 0:
            plan.items.extend(objects)
        try:
            results.append(writer.write_data(plan, planner).wait())
        except RuntimeError as error:
            if (reason := system_error(error)) is None:
                raise
            raise reason from error
    entries: dict[str, Any] = {key: BytesStorageMetadata() for key in empty_objects}
    for piece in pieces:
        entry = entries.setdefault(
            piece.key,
            TensorStorageMetadata(
                TensorProperties(dtype=piece.dtype),
                torch.Size((*piece.leading, *piece.shape)),
                [],
            ),
        )
        entry.chunks.append(_chunk(piece))
    writer.finish(Metadata(entries, planner_data={}), results)
    config = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (folder / "metadata.json").write_text(json.dumps(config), encoding="utf-8")


def _files(pieces: Sequence[Piece], max_bytes: int) -> Iterator[list[int]]:
    """Numbers of the pieces of each file."""
    numbers: list[int] = []
    size = 0
    for number, piece in enumerate(pieces):
        if numbers and size + piece.num_bytes > max_bytes:
            yield numbers
            numbers, size = [], 0
        numbers.append(number)
        size += piece.num_bytes
    yield numbers


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))


def _object_item(key: str) -> WriteItem:
    return WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO)


class _LazySavePlanner(SavePlanner):
    """Makes a piece when torch's writer has come to it."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = {(p.key, torch.Size(p.offsets)): p for p in pieces}
        self._order = list(pieces)
        assert len(self._pieces) == len(self._order), "a piece is there twice"

    def item(self, number: int) -> WriteItem:
        piece = self._order[number]
        return WriteItem(
            index=MetadataIndex(piece.key, torch.Size(piece.offsets)),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=_chunk(piece),
                properties=TensorProperties(dtype=piece.dtype),
                size=torch.Size((*piece.leading, *piece.shape)),
            ),
        )

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            # As Megatron writes an extra state that is None: one entry for each of its parts.
            stream = io.BytesIO()
            torch.save([None], stream)
            return stream
        index = write_item.index
        piece = self._pieces[index.fqn, index.offset]
        tensor = piece.make()
        assert tensor.shape == piece.shape and tensor.dtype == piece.dtype, (piece, tensor.shape)
        return tensor.reshape(piece.sizes).contiguous()

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: the plans are made outside."""

    def create_local_plan(self) -> SavePlan:
        raise NotImplementedError

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        raise NotImplementedError


class CheckpointReader:
    """Reads parts of a checkpoint's tensors, in whatever chunks they were written."""

    def __init__(self, folder: Path) -> None:
        """Read the table of contents.

        Raises:
            ValueError: it is missing or damaged.
        """
        self.folder = folder
        self.metadata = read_metadata(folder)
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        self._chunks: dict[str, dict[Shape, list[ChunkStorageMetadata]]] = {}

    def shapes(self) -> dict[str, Shape]:
        """Of the whole tensors, by key."""
        return {key: tuple(entry.size) for key, entry in contents(self.metadata).tensors.items()}

    def dtype(self, key: str) -> torch.dtype:
        """Of the tensor."""
        return self._entry(key).properties.dtype

    def read(self, key: str, index: Shape) -> Tensor:
        """The part at `index` of the leading axes, whole in the others.

        Raises:
            ConversionError: a file is missing or damaged, or the chunks do not cover the part.
        """
        whole = tuple(self._entry(key).size)
        shape = whole[len(index) :]
        target = torch.empty(*(1 for _ in index), *shape, dtype=self.dtype(key))
        items, covered = self._plan(key, index, whole)
        if covered != target.numel():
            raise ConversionError(
                f"{self.folder}: {key} at {list(index)} has {covered} of {target.numel()} numbers; "
                "the checkpoint is incomplete, write or copy it again"
            )
        try:
            self._reader.read_data(LoadPlan(items), _ReadInto(target)).wait()
        # A cut-off file makes torch raise nearly anything.
        except Exception as error:
            files = {self.metadata.storage_data[i.storage_index].relative_path for i in items}
            raise ConversionError(
                f"{self.folder}: cannot read {key} from {', '.join(sorted(files))}: {error}. The "
                "file is missing, cut off or damaged; copy the checkpoint again"
            ) from error
        return target.reshape(shape)

    def _entry(self, key: str) -> TensorStorageMetadata:
        return self.metadata.state_dict_metadata[key]

    def _plan(self, key: str, index: Shape, whole: Shape) -> tuple[list[ReadItem], int]:
        """What to read from which chunks, and how many numbers that makes."""
        first = (*index, *(0 for _ in whole[len(index) :]))
        sizes = (*(1 for _ in index), *whole[len(index) :])
        items, covered = [], 0
        for chunk in self._near(key, index):
            overlap = [
                (max(a, b), min(a + m, b + n))
                for a, m, b, n in zip(first, sizes, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(low >= high for low, high in overlap):
                continue
            lengths = torch.Size(high - low for low, high in overlap)
            items.append(
                ReadItem(
                    type=LoadItemType.TENSOR,
                    dest_index=MetadataIndex(key),
                    dest_offsets=torch.Size(low - a for (low, _), a in zip(overlap, first)),  # noqa: B905
                    storage_index=MetadataIndex(key, chunk.offsets),
                    storage_offsets=torch.Size(
                        low - b for (low, _), b in zip(overlap, chunk.offsets, strict=True)
                    ),
                    lengths=lengths,
                )
            )
            covered += lengths.numel()
        return items, covered

    def _near(self, key: str, index: Shape) -> list[ChunkStorageMetadata]:
        """Chunks that may overlap; those of a single layer and expert are found by it."""
        table = self._chunks.get(key)
        if table is None:
            table = self._chunks[key] = {}
            for chunk in self._entry(key).chunks:
                single = all(size == 1 for size in chunk.sizes[: len(index)])
                place = tuple(chunk.offsets[: len(index)]) if single else ()
                table.setdefault(place, []).append(chunk)
        several = table.get((), []) if index else []
        return [*table.get(index, []), *several]


class _ReadInto(LoadPlanner):
    """Has torch's reader put what it reads into one tensor."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self._target
        for axis, (offset, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            target = target.narrow(axis, offset, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing left to do: the tensor is a view of the target."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: the plan is made outside."""

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError
