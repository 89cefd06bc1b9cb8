"""What a section checks of its values: all that is wrong, in one error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from megatron_prefix.config.loader import ConfigError


def refuse(faults: Iterable[str]) -> None:
    """Raise one error for all faults, each a line that begins with its key; none is well.

    Raises:
        ConfigError: there is a fault.
    """
    if found := tuple(faults):
        raise ConfigError(*found)


def below(section: Any, least: int, *names: str) -> Iterator[str]:
    """A fault for each of the fields that is below `least`; None is no value."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not value >= least:
            yield f"{name}: {value} must be at least {least}"
