"""The reader of a file of records: JSON Lines, Parquet or tasks, by the end of its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_prefix.rollouts.gym.task_file import TaskFile, library_version
from megatron_prefix.rollouts.gym.task_spec import read_task_spec
from megatron_prefix.rollouts.json_lines import JsonLinesFile
from megatron_prefix.rollouts.names import PARQUET_ENDING, fault_of_path, is_task_file
from megatron_prefix.rollouts.parquet import ParquetFile
from megatron_prefix.rollouts.record import RecordFile


def open_record_file(path: Path) -> RecordFile:
    """The reader of a file, by the end of its name.

    Raises:
        ValueError: see `fault_of_path`, or the package that reads it is not installed.
    """
    if fault := fault_of_path(path):
        raise ValueError(fault)
    if is_task_file(path):
        return TaskFile(path)
    is_parquet = path.name.lower().endswith(PARQUET_ENDING)
    return ParquetFile(path) if is_parquet else JsonLinesFile(path)


def stamp_of(path: Path) -> tuple[Any, ...]:
    """What changes where a file's records do: for a cache of them on this machine."""
    files = [path]
    version = ""
    if is_task_file(path):
        files += [path.parent / other for other in read_task_spec(path).unlike]
        version = library_version()
    stats = [file.stat() for file in files]
    return (version, *((stat.st_size, stat.st_mtime_ns) for stat in stats))
