"""One JSON object as plain Python values, or a precise error."""

from __future__ import annotations

import json
import reprlib
from typing import Any


def parse_object(line: bytes, source: str) -> dict[str, Any]:
    """The plain values of a line, without those that are null.

    Raises:
        ValueError: it is no JSON object, or names a field twice.
    """
    try:
        text = line.decode("utf-8-sig").rstrip("\r\n")
        values = json.loads(text, object_pairs_hook=refuse_duplicates)
    except json.JSONDecodeError as error:
        # Its own text says line 1, of what is one line of many.
        raise ValueError(
            f"{source}: not a JSON object: {error.msg} at column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not a JSON object: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source}: not a JSON object: {reprlib.repr(values)}")
    return {name: value for name, value in values.items() if value is not None}


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, for `json.loads`.

    Raises:
        ValueError: a field is there twice.
    """
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is there twice")
    return values
