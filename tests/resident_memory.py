"""How much memory a function takes, as the kernel counts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def peak_growth(function: Callable[[], object]) -> int:
    """Bytes by which it raises this process's resident memory, at its peak."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    function()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith(name + ":")]
    return int(value) * 1024
