"""Packages that the bare install does not have: imported where they are used, named when missing.

A missing one is a `MissingPackageError`: one line that says what needs it and what to install.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

Extra = str
"""A name in `extras_require` of setup.py."""


class MissingPackageError(ValueError):
    """A package is missing, or does not work; the message says what needs it and how to get it."""


@contextlib.contextmanager
def needed_by(what: str, *, extra: Extra) -> Iterator[None]:
    """Within the block packages are imported; one that cannot be is named with its extra.

    Args:
        what: the option or the work that needs them, as the message's subject.
        extra: the extra of megatron-prefix that holds them.

    Raises:
        MissingPackageError: a package is not installed, or its import failed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("", "megatron_prefix"):
            raise
        raise MissingPackageError(missing_line(what, missing, extra)) from error
    except ImportError as error:
        # Installed, but it refuses its surroundings, another version of NumPy for example.
        raise MissingPackageError(
            f"{what} needs a package whose import failed ({error}); {installing(extra)}"
        ) from error


def is_installed(package: str) -> bool:
    """Whether a package is there; it is not imported."""
    return importlib.util.find_spec(package) is not None


def missing_line(what: str, package: str, extra: Extra) -> str:
    """What to tell a user who lacks a package."""
    return f"{what} needs {package}, which is not installed; {installing(extra)}"


def installing(extra: Extra) -> str:
    """How to get the packages of an extra."""
    return f"pip install 'megatron-prefix[{extra}]'"
