"""JSON objects whose lists of numbers become arrays, by simdjson, without a Python object for each.

This is the fast way to read a line. It gives a line up wherever it is not sure to read it as
`parse_object` does: that one then reads it, or says what is wrong with it.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.packages import installing
from megatron_prefix.rollouts.json_object import refuse_duplicates
from megatron_prefix.rollouts.kinds import FLAGS, Kind, Lists, offsets_of
from megatron_prefix.rollouts.record import ARRAY_FIELDS

logger = logging.getLogger(__name__)

ArrayReader = Callable[[bytes], "dict[str, Any] | None"]
"""Gives the values of a line, without those that are null; None where it gives the line up."""


def array_reader() -> ArrayReader | None:
    """A reader of lines, for one thread; None where its package is not installed."""
    simdjson = _simdjson()
    return None if simdjson is None else _LineReader(simdjson).read


@functools.cache
def _simdjson() -> Any:
    """The package; None, which is logged once, where it is not installed."""
    try:
        import simdjson
    except ImportError:
        logger.warning(
            "pysimdjson is not installed: JSON Lines are read several times as slowly; %s",
            installing("train"),
        )
        return None
    return simdjson


class _GivenUp(Exception):
    """The line is for `parse_object`."""


class _LineReader:
    """Reads lines by one parser, which takes the next line when nothing refers to the last."""

    def __init__(self, simdjson: Any) -> None:
        self._parser = simdjson.Parser()
        self._object, self._array = simdjson.Object, simdjson.Array

    def read(self, line: bytes) -> dict[str, Any] | None:
        """The values of a line; None where it is given up."""
        try:
            return self._values(line)
        except (_GivenUp, ValueError, TypeError, RuntimeError):
            return None

    def _values(self, line: bytes) -> dict[str, Any]:
        document = self._parser.parse(line)
        if not isinstance(document, self._object):
            raise _GivenUp
        names = list(document.keys())
        if len(set(names)) != len(names):
            raise _GivenUp
        brackets = sum(name.count("[") for name in names)
        values: dict[str, Any] = {}
        for name in names:
            value, opened = self._value(document[name], ARRAY_FIELDS.get(name))
            brackets += opened
            if value is not None:
                values[name] = value
        # Buffers flatten lists of any depth. A list within a list of numbers shows as a bracket
        # more, unless a string has brackets that are not written as such.
        if line.count(b"[") != brackets or b"\\u005" in line:
            raise _GivenUp
        return values

    def _value(self, value: Any, kind: Kind | None) -> tuple[Any, int]:
        """A field's value, and the opening brackets that it is written with."""
        if isinstance(value, str):
            return value, value.count("[")
        if not isinstance(value, (self._array, self._object)):
            return value, 0
        if kind is not None and isinstance(value, self._array) and len(value) > 0:
            found = self._lists(value, kind)
            if found is not None:
                return found, 1 + (len(found) if isinstance(found, Lists) else 0)
        text = value.mini
        return json.loads(text, object_pairs_hook=refuse_duplicates), text.count(b"[")

    def _lists(self, value: Any, kind: Kind) -> NDArray | Lists | None:
        """A list of numbers, or of lists of them; None where not all of them are of the kind."""
        if not isinstance(value[0], self._array):
            return _flat(value, kind)
        inner = list(value)
        if not all(isinstance(item, self._array) for item in inner):
            return None
        offsets = offsets_of([len(item) for item in inner])
        if kind is FLAGS:
            parts = [_flat(item, kind) for item in inner]
            if any(part is None for part in parts):
                return None
            return Lists(values=np.concatenate(parts), offsets=offsets)
        found = _flat(value, kind)
        if found is None or len(found) != offsets[-1]:
            return None
        return Lists(values=found, offsets=offsets)


def _flat(value: Any, kind: Kind) -> NDArray | None:
    """The numbers of a list, and of the lists in it; None where not all are of the kind."""
    if kind is FLAGS:
        flags = value.as_list()
        return np.array(flags, dtype=np.bool_) if set(map(type, flags)) <= {bool} else None
    code = "i" if kind.wide is np.int64 else "d"  # of simdjson's buffers
    try:
        return np.frombuffer(value.as_buffer(of_type=code), dtype=kind.wide)
    except (TypeError, ValueError):
        return None
