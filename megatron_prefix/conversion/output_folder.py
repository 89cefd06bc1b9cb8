"""A folder that appears complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_prefix.conversion.errors import ConversionError
from megatron_prefix.system_errors import system_error

_SPARE_BYTES = 64 * 2**20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def output_folder(path: Path, *, force: bool, needed_bytes: int = 0) -> Iterator[Path]:
    """Fill the folder that is yielded; it gets its name `path` when the block ends well.

    Args:
        path: what is to appear. Its parent is made where it is missing.
        force: replace what is there. It stays until the new folder is complete.
        needed_bytes: what will be written; checked against the free space before.

    Raises:
        ConversionError: `path` exists and `force` is not set, another conversion to it is under
            way or was cut off, or the disk is full. What was written by then is removed.
    """
    path = path.absolute()
    if path.exists() and not force:
        raise ConversionError(f"{path}: exists already; choose another folder, or add --force")
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if force and partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
    except FileExistsError as error:
        if partial.exists():
            raise ConversionError(
                f"{partial}: exists already: another conversion is writing it, or one was cut off. "
                "If none is running, remove it, or add --force"
            ) from error
        raise ConversionError(f"{path.parent}: not a folder; choose another output") from error
    except OSError as error:
        raise ConversionError(f"{path}: cannot be made: {error.strerror or error}") from error
    try:
        free = shutil.disk_usage(partial).free
        if needed_bytes and needed_bytes + _SPARE_BYTES > free:
            raise ConversionError(
                f"{path}: {_gigabytes(needed_bytes)} are needed, {_gigabytes(free)} are free "
                "there; free some space, or choose another disk"
            )
        yield partial
        _sync(partial)
        _put_in_place(partial, path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = system_error(error)
        if reason is not None and reason.errno in _NO_ROOM:
            raise ConversionError(
                f"{path}: {os.strerror(reason.errno).lower()} while writing; nothing is left of "
                "it. Free some space, or choose another disk"
            ) from error
        raise


def _put_in_place(partial: Path, path: Path) -> None:
    if not path.exists():
        os.replace(partial, path)
        return
    # Both names change hands in one moment each, and the old content goes only at the end.
    old = path.with_name(path.name + ".replaced")
    if old.exists():
        shutil.rmtree(old)
    os.replace(path, old)
    os.replace(partial, path)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink()


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
