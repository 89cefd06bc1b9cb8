"""Files that a configuration names by a pattern."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path


def matching_files(path: Path) -> tuple[Path, ...]:
    """The files of a pattern with `*`, `?` or `[...]`, in order; the path itself where it is none,
    or where nothing matches, so that it can be named."""
    if path.exists() or not glob.has_magic(str(path)):
        return (path,)
    return tuple(sorted(map(Path, glob.glob(str(path), recursive=True)))) or (path,)


def all_files(paths: Iterable[Path]) -> tuple[Path, ...]:
    """The files of several paths."""
    return tuple(file for path in paths for file in matching_files(path))
