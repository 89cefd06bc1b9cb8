"""The reader of a file of records: JSON Lines, Parquet or tasks, by the end of its name.

What reads tasks is imported where there are such files: it needs PyYAML, and records do not.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from megatron_prefix.rollouts.json_lines import JsonLinesFile
from megatron_prefix.rollouts.names import PARQUET_ENDING, fault_of_path, is_task_file
from megatron_prefix.rollouts.parquet import ParquetFile
from megatron_prefix.rollouts.record import RecordFile

_BLOCKS, _BLOCK_BYTES = 128, 1 << 20


def open_record_file(path: Path) -> RecordFile:
    """The reader of a file, by the end of its name.

    Raises:
        ValueError: see `fault_of_path`, or the package that reads it is not installed.
    """
    if fault := fault_of_path(path):
        raise ValueError(fault)
    if is_task_file(path):
        from megatron_prefix.rollouts.gym.task_file import TaskFile

        return TaskFile(path)
    is_parquet = path.name.lower().endswith(PARQUET_ENDING)
    return ParquetFile(path) if is_parquet else JsonLinesFile(path)


def identity_of(path: Path) -> list[Any]:
    """Name, bytes and a digest of a file: what a saved position in it holds for.

    The name is without folder, so that the data may move between runs. Of a large file the digest
    is one of blocks that are spread evenly over it.
    """
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        for index in range(min(_BLOCKS, -(-size // _BLOCK_BYTES))):
            if size > _BLOCKS * _BLOCK_BYTES:
                file.seek(index * (size - _BLOCK_BYTES) // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
    return [path.name, size, digest.hexdigest()]


def stamp_of(path: Path) -> tuple[Any, ...]:
    """What changes where a file's records do: for a cache of them on this machine."""
    files = [path]
    version = ""
    if is_task_file(path):
        from megatron_prefix.rollouts.gym.task_file import library_version
        from megatron_prefix.rollouts.gym.task_spec import read_task_spec

        files += [path.parent / other for other in read_task_spec(path).unlike]
        version = library_version()
    stats = [file.stat() for file in files]
    return (version, *((stat.st_size, stat.st_mtime_ns) for stat in stats))
