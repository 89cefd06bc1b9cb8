"""The reader of a file of records: JSON Lines or Parquet, by the end of its name."""

from __future__ import annotations

from pathlib import Path

from megatron_prefix.rollouts.json_lines import JsonLinesFile
from megatron_prefix.rollouts.names import PARQUET_ENDING, fault_of_path
from megatron_prefix.rollouts.parquet import ParquetFile
from megatron_prefix.rollouts.record import RecordFile


def open_record_file(path: Path) -> RecordFile:
    """The reader of a file, by the end of its name.

    Raises:
        ValueError: see `fault_of_path`, or the package that reads it is not installed.
    """
    if fault := fault_of_path(path):
        raise ValueError(fault)
    is_parquet = path.name.lower().endswith(PARQUET_ENDING)
    return ParquetFile(path) if is_parquet else JsonLinesFile(path)
