"""Records that are well formed and that this model cannot train on: refused, or left out.

A prompt too long for the model is one. What is wrong with a record itself is always an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Item = TypeVar("Item")


class UnusableRecord(ValueError):
    """A record that a model cannot train on, as its error says."""

    def __init__(self, message: str, reason: str) -> None:
        """Say it in a message that begins with the record's source, and in a few words."""
        super().__init__(f"{message}, or leave out such records (rollouts.unusable: leave_out)")
        self.reason = reason


class Usable:
    """Lets through what can be used."""

    def __init__(self, *, leave_out: bool = False) -> None:
        """Leave out what cannot, or raise its error."""
        self._leave_out = leave_out
        self.left_out: dict[str, int] = {}
        """Reasons, and how often each came up."""

    def made(self, make: Callable[[], Item]) -> Item | None:
        """What `make` makes of a record; None where the record is left out.

        Raises:
            ValueError: of `make`.
        """
        try:
            return make()
        except UnusableRecord as error:
            if not self._leave_out:
                raise
            self.left_out[error.reason] = self.left_out.get(error.reason, 0) + 1
            return None
