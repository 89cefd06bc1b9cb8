"""How many tokens a model was given and how many it computed, counted and logged."""

from __future__ import annotations

import logging
from dataclasses import dataclass

_logger = logging.getLogger("megatron_prefix")


@dataclass(kw_only=True)
class TokenCounter:
    """Of the packed rows that a model chunk has run on this process, in training or not."""

    rows: int = 0
    """Packed rows."""
    shared_rows: int = 0
    """Those in which something was shared."""
    tokens_given: int = 0
    """Tokens of their sequences, each prompt as often as the framework repeats it."""
    tokens_computed: int = 0
    """Tokens that the model has run, padding of its own included."""

    @property
    def saved_fraction(self) -> float:
        """The part of the given tokens that was not computed; 0 before the first row."""
        return 1 - self.tokens_computed / self.tokens_given if self.tokens_given else 0.0

    def add(self, *, given: int, computed: int, shared: bool) -> None:
        """Count one row."""
        self.rows += 1
        self.shared_rows += shared
        self.tokens_given += given
        self.tokens_computed += computed

    def log_now_and_then(self) -> None:
        """Log after row 1, 10, 100, and so on.

        As a warning, since frameworks show nothing less of a library.
        """
        if self.rows == 10 ** (len(str(self.rows)) - 1):
            _logger.warning("megatron_prefix: %s", str(self))  # it goes on counting

    def __str__(self) -> str:
        return (
            f"{self.rows} packed rows of {self.tokens_given} tokens ran as {self.tokens_computed} "
            f"tokens ({self.saved_fraction:.0%} saved); {self.shared_rows} of them shared a prefix"
        )
