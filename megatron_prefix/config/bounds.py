"""Bounds of a section's numbers."""

from __future__ import annotations

from typing import Any

from megatron_prefix.config.loader import ConfigError


def at_least(section: Any, least: int, *names: str) -> None:
    """Refuse the first of the fields that is below `least`; None is no value."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{name}: {value} must be at least {least}")
