"""A limit on the memory of a process that computes with what a model wrote."""

from __future__ import annotations

import resource
from pathlib import Path

_BYTES = 2 << 30


def limit_memory() -> None:
    """Let this process take 2 GiB more than it has; beyond them Python raises a MemoryError.

    On Linux alone, where the memory that it has can be looked up.
    """
    sizes = Path("/proc/self/statm")
    if not sizes.exists():
        return
    has = int(sizes.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = has + _BYTES
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
