"""A file system of a given size, to be filled."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


class SmallDisk:
    """A file system in memory until the `with` block ends; tests skip where there can be none."""

    def __init__(self, path: Path, size: int) -> None:
        """Mount `size` bytes at `path`, which is made."""
        self.path = path
        path.mkdir()
        mounted = _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))
        if mounted.returncode != 0:
            pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")

    @property
    def used(self) -> int:
        """Bytes that are taken, whole blocks."""
        return shutil.disk_usage(self.path).used

    def resize(self, size: int) -> None:
        """Give it another size in bytes."""
        resized = _mount("-o", f"remount,size={size}", str(self.path))
        assert resized.returncode == 0, resized.stderr

    def __enter__(self) -> SmallDisk:
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)


def _mount(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
