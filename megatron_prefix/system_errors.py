"""The operating system's error behind those that libraries make of it."""

from __future__ import annotations


def system_error(error: BaseException) -> OSError | None:
    """The error of the system that an error comes from, if it comes from one.

    torch's archive writer answers a failed write with "unexpected pos", whatever the reason; the
    reason is the error that this one was raised in the course of.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None
