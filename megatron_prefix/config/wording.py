"""What the loader says of a value, a key or a type, in a user's words."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin


def refusal(path: str, value: Any, annotation: Any) -> str:
    """What is wrong with a value that is not of its type."""
    message = f"expected {described(annotation)}, got {shown(value)}"
    choices = _choices(annotation)
    if isinstance(value, str) and choices:
        close = difflib.get_close_matches(value, [c for c in choices if isinstance(c, str)], n=1)
        message += "".join(f"; did you mean {choice}?" for choice in close)
    elif str in members_of(annotation) or any(isinstance(choice, str) for choice in choices):
        message += f"; {quoting(value)}" if isinstance(value, (bool, int, float, dict)) else ""
    elif float in members_of(annotation) and _is_not_finite(value):
        message += "; set a finite number"
    elif int in members_of(annotation) and isinstance(value, float) and value.is_integer():
        message += f"; write {int(value)}"
    elif get_origin(annotation) in (list, tuple) and not isinstance(value, (Mapping, type(None))):
        message += f"; write [{shown(value)}]"
    return f"{path}: {message}" if path else message


def _is_not_finite(value: Any) -> bool:
    try:
        return not math.isfinite(float(value))
    except OverflowError:
        return True
    except (TypeError, ValueError):
        return False


def quoting(value: Any) -> str:
    """What to put in quotes, for a value that YAML has read as no text."""
    if isinstance(value, bool):
        return "YAML reads yes, no, on, off, true and false as true or false: put text in quotes"
    if isinstance(value, dict):
        return "YAML reads {...} as a mapping: put text that begins with { in quotes"
    return "put text in quotes"


def members_of(annotation: Any) -> tuple[Any, ...]:
    """The types of a union; a type alone is its own only member."""
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if is_union else (annotation,)


def _choices(annotation: Any) -> list[Any]:
    return [
        choice
        for member in members_of(annotation)
        if get_origin(member) is Literal
        for choice in get_args(member)
    ]


def described(annotation: Any) -> str:
    """A field's type as a user of YAML knows it."""
    names = {bool: "bool (true or false)", types.NoneType: "null", Path: "path", Any: "anything"}
    if annotation in names:
        return names[annotation]
    origin, members = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(described(member) for member in members)
    if origin is Literal:
        texts = [choice if isinstance(choice, str) else shown(choice) for choice in members]
        return f"one of {', '.join(texts)}"
    if origin is tuple and members[1:] != (...,):
        return f"list of {len(members)}: {', '.join(described(member) for member in members)}"
    if origin in (list, tuple):
        return f"list of {described(members[0])}"
    if origin is dict or dataclasses.is_dataclass(annotation):
        return "mapping of keys to values"
    return annotation.__name__


def shown(value: Any) -> str:
    """A value as YAML writes it, shortened."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError):
        # A mapping whose keys are lists, or one that an alias has put into itself.
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def suggestion(key: Any, value: Any, cls: type) -> str:
    """What an unknown key may have been meant to be."""
    annotations = typing.get_type_hints(cls)
    valid = [field.name for field in dataclasses.fields(cls) if field.init]
    meant = difflib.get_close_matches(key, valid, n=1) if isinstance(key, str) else []
    # A key of a section that was written without its section.
    meant = meant or [
        f"{name}.{key}"
        for name in valid
        for member in members_of(annotations[name])
        if dataclasses.is_dataclass(member)
        and key in {field.name for field in dataclasses.fields(member)}
    ]
    name, colon, text = key.partition(":") if isinstance(key, str) else ("", "", "")
    if colon and name in valid and value is None:
        return f"YAML wants a space after a colon: {name}: {text}"
    question = f"did you mean {' or '.join(meant)}? " if meant else ""
    return f"{question}Valid keys: {', '.join(valid)}"


def located(path: str, message: str, fields: Mapping[str, Any]) -> str:
    """A dataclass's own error with the dotted key in front of it.

    A message that begins with the name of a field continues the key: `rollouts` and `top_p: 2 ...`
    make `rollouts.top_p: 2 ...`.
    """
    if not path:
        return message
    begins_with_field = re.split(r"\W", message, maxsplit=1)[0] in fields
    return f"{path}.{message}" if begins_with_field else f"{path}: {message}"


def join(path: str, key: Any) -> str:
    """A dotted key."""
    name = key if isinstance(key, str) else shown(key)
    return f"{path}.{name}" if path else name
