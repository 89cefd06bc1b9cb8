"""The one error of this package."""

from __future__ import annotations


class ConversionError(ValueError):
    """A model that cannot be converted; the message names the item, and what to do."""
