"""What shared prefixes make of one option of Megatron's config: the record, and how rows are made.

used      the option does with shared prefixes what it does without them: our code honours it, or
          Megatron does in modules that see one row after another.
refused   some values would change what is computed, or fail late: these are refused by name.
harmless  it changes nothing of what a training step with shared prefixes computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

KNOWN_RELEASES = ("0.14", "0.15", "0.16", "0.17", "0.18", "0.19")
"""The releases of Megatron-Core that the table was made from."""


class UnsupportedOptionError(ValueError):
    """Options of the model's config that cannot work with shared prefixes, all of them at once."""

    def __init__(self, message: str, refusals: tuple[Refusal, ...] = ()) -> None:
        # Megatron's `build_module` raises the error anew, with the classes that it was building
        # behind the message. They say nothing about an option.
        super().__init__(message.split(" when instantiating ")[0])
        self.refusals = refusals


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """One option with a value that is refused."""

    option: str
    value: Any
    why: str
    """What shared prefixes would change, or what would fail."""
    instead: str
    """What to do, as a sentence without its full stop."""
    beside: str = ""
    """The value of another option that it is refused with, as `name=value`."""

    @property
    def setting(self) -> str:
        """Name and value, and what it is refused with."""
        setting = f"{self.option}={self.value!r}"
        return f"{setting} with {self.beside}" if self.beside else setting


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why a value is refused: what a check of an option finds. See `Refusal`."""

    why: str
    instead: str
    beside: str = ""


Check = Callable[[Any, Any], "Reason | None"]
"""(value, config) -> why the value is refused, or None."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One field of Megatron's `TransformerConfig`, `MLATransformerConfig` or their parents."""

    name: str
    kind: Literal["used", "refused", "harmless"]
    why: str
    """Who honours it; what shared prefixes would change; or why it changes nothing."""
    check: Check | None = None
    """Of options that are refused, always or for some values."""
    first: str = KNOWN_RELEASES[0]
    """The first release that has it; the oldest known one also for what is older."""
    last: str | None = None
    """The last release that has it; None while the newest does."""
    declared: bool = True
    """False: no release declares it; frameworks or a development branch set it on the config."""

    def refusal(self, config: Any) -> Refusal | None:
        """Why the config's value is refused; None where it is not, or is not there."""
        if self.check is None or not hasattr(config, self.name):
            return None
        value = getattr(config, self.name)
        found = self.check(value, config)
        if found is None:
            return None
        return Refusal(
            option=self.name,
            value=value,
            why=found.why,
            instead=found.instead,
            beside=found.beside,
        )


def used(*names: str, why: str, check: Check | None = None, **releases: Any) -> list[Option]:
    """Rows of options that do what they do without shared prefixes."""
    return [Option(name=name, kind="used", why=why, check=check, **releases) for name in names]


def harmless(*names: str, why: str, **releases: Any) -> list[Option]:
    """Rows of options that change nothing here."""
    return [Option(name=name, kind="harmless", why=why, **releases) for name in names]


def refused(
    *names: str, when: Callable[[Any], bool], why: str, instead: Any, **releases: Any
) -> list[Option]:
    """Rows of options that are refused for what `when` says of their value.

    Args:
        instead: the value to set.
    """

    def rows(name: str) -> Option:
        def check(value: Any, config: Any) -> Reason | None:
            return Reason(why=why, instead=set_to(name, instead)) if when(value) else None

        return Option(name=name, kind="refused", why=why, check=check, **releases)

    return [rows(name) for name in names]


def set_to(name: str, value: Any) -> str:
    """Tell users to set an option, so that it is right in Python and in YAML."""
    null = " (null in YAML)" if value is None else ""
    return f"Set {name} to {value!r}{null}"


def is_set(value: Any) -> bool:
    """Whether a flag or an optional value is set."""
    return value is not None and value is not False


def positive(value: Any) -> bool:
    """Whether a number, or one of a list, is above 0."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(v is not None and v > 0 for v in values)


def more_than_one(value: Any) -> bool:
    """Whether a number is above 1."""
    return value is not None and value > 1
