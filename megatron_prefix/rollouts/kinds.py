"""Lists of numbers in records, as arrays: what each kind of list holds, and how it is read.

A list may come as Python's own values or as an array, and lists of lists as `Lists`. Both are read
by the same functions, and refused in the same words.
"""

from __future__ import annotations

import contextlib
import dataclasses
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Lists:
    """Lists of numbers, one behind the other in one array."""

    values: NDArray
    offsets: NDArray[np.integer]
    """[lists + 1] where each list begins in `values`, and where the last one ends; from 0."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of(cls, parts: Sequence[NDArray], dtype: type) -> Lists:
        """Of arrays; `dtype` is for where there are none."""
        values = np.concatenate([np.zeros(0, dtype), *parts])
        return cls(values=values, offsets=offsets_of([len(part) for part in parts]))

    def plain(self) -> list[list[Any]]:
        """As Python's own lists and numbers."""
        values, ends = self.values.tolist(), self.offsets.tolist()
        return [values[ends[i] : ends[i + 1]] for i in range(len(self))]


def plain_value(value: Any) -> Any:
    """Python's own lists and numbers in place of an array or `Lists`; another value as it is."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.plain() if isinstance(value, Lists) else value


def offsets_of(lengths: Sequence[int] | NDArray) -> NDArray[np.int64]:
    """[n + 1] where each of n items begins, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a list holds. In texts of errors {} is the value."""

    types: frozenset[type]
    """Of Python's values."""
    codes: str
    """The kinds of NumPy's types (`dtype.kind`) that are taken."""
    wide: type
    """What Python's values are first read as."""
    dtype: type
    """Of the array that is read."""
    other_type: str
    beyond: str
    """The error of a number that `dtype` does not hold."""
    no_list: str = "{} is not a list"
    is_finite: bool = True


TOKENS = Kind(
    types=frozenset({int}),
    codes="iu",
    wide=np.int64,
    dtype=np.int32,
    other_type="{} is not a token id (a whole number)",
    beyond="token {} is outside every vocabulary (ids have at most 32 bits)",
    no_list="{} is not a list of token ids",
)
KEYS = Kind(
    types=frozenset({int}),
    codes="iu",
    wide=np.int64,
    dtype=np.int64,
    other_type="{} is not a whole number of 64 bits",
    beyond="{} is not a whole number of 64 bits",
)
NUMBERS = Kind(
    types=frozenset({int, float}),
    codes="iuf",
    wide=np.float64,
    dtype=np.float64,
    other_type="{} is not a number",
    beyond="{} is too large for a float",
)
LOGPROBS = dataclasses.replace(
    NUMBERS, dtype=np.float32, beyond="{} is beyond the numbers of 32 bits"
)
FLAGS = Kind(
    types=frozenset({bool}),
    codes="b",
    wide=np.bool_,
    dtype=np.bool_,
    other_type="{} is not true or false",
    beyond="",
)


def read_list(value: Any, where: str, kind: Kind) -> NDArray:
    """A list as an array of its kind; its numbers are finite.

    Raises:
        ValueError: it is no such list; it begins with `where`.
    """
    return _read(_listed(value, kind, where), kind, lambda i: f"{where}[{i}]")


def read_item(value: Any, where: str, kind: Kind) -> NDArray:
    """A value of the kind, in an array of one; see `read_list`."""
    return _read([plain_value(value)], kind, lambda _: where)


def read_lists(value: Any, where: str, kind: Kind) -> Lists:
    """A list of lists; see `read_list`."""
    if isinstance(value, Lists):
        if _is_of(value.values, kind):
            with contextlib.suppress(ValueError):  # which is named below, by its list
                return Lists(values=_read(value.values, kind, str), offsets=value.offsets)
        value = np.split(value.values, value.offsets[1:-1])
    found = _listed(plain_value(value), kind, where, "{} is not a list")
    parts = [
        read_list(_as_in_arrays(part, kind), f"{where}[{i}]", kind) for i, part in enumerate(found)
    ]
    return Lists.of(parts, kind.dtype)


def _listed(
    value: Any, kind: Kind, where: str, no_list: str | None = None
) -> Sequence[Any] | NDArray:
    if _is_of(value, kind) and value.ndim == 1:
        return value
    value = plain_value(value)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return value
    raise ValueError(f"{where}: {(no_list or kind.no_list).format(reprlib.repr(value))}")


def _is_of(value: Any, kind: Kind) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in kind.codes


def _read(given: Sequence[Any] | NDArray, kind: Kind, where: Callable[[int], str]) -> NDArray:
    values = given if isinstance(given, np.ndarray) else _converted(given, kind, where)
    found = values
    if values.dtype != kind.dtype:
        with np.errstate(over="ignore"):
            found = values.astype(kind.dtype)
    if found is values and not (kind.is_finite and found.dtype.kind == "f"):
        return found
    is_wrong = ~np.isfinite(found) if found.dtype.kind == "f" else found != values
    if is_wrong.any():
        i = int(is_wrong.argmax())
        is_lost = np.isfinite(values[i]) or found.dtype.kind != "f"
        fault = kind.beyond if is_lost else "{} is not a finite number"
        raise ValueError(f"{where(i)}: {fault.format(given[i])}")
    return found


def _converted(values: Sequence[Any], kind: Kind, where: Callable[[int], str]) -> NDArray:
    if not kind.types.issuperset(map(type, values)):
        for i, value in enumerate(values):
            if type(value) in kind.types:
                continue
            if not (isinstance(value, np.generic) and value.dtype.kind in kind.codes):
                if isinstance(value, list):
                    value = [_as_in_arrays(item, kind) for item in value]
                shown = reprlib.repr(value)
                raise ValueError(f"{where(i)}: {kind.other_type.format(shown)}")
    try:
        return np.array(values, dtype=kind.wide)
    except OverflowError as error:
        limits = np.iinfo(kind.wide) if kind.wide is np.int64 else np.finfo(kind.wide)
        i = next(i for i, v in enumerate(values) if not int(limits.min) <= v <= int(limits.max))
        raise ValueError(f"{where(i)}: {kind.beyond.format(reprlib.repr(values[i]))}") from error


def _as_in_arrays(value: Any, kind: Kind) -> Any:
    """A whole number among numbers as an array has it, so that an error shows the same of both."""
    is_whole = "f" in kind.codes and type(value) is int and abs(value) < 2**64
    return float(value) if is_whole else value
