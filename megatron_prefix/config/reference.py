"""The keys of a configuration as they are documented: type, default and the docstring below each.

What stands here is read from the dataclasses and from their source, so that it cannot be another
text than theirs.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import typing
from collections.abc import Iterator
from typing import Any


def sections(cls: type, path: str = "") -> Iterator[tuple[str, type]]:
    """The dotted key and the dataclass of every section, in the order of their fields."""
    for field in dataclasses.fields(cls):
        section = dataclass_of(typing.get_type_hints(cls)[field.name])
        if section is not None:
            name = f"{path}{field.name}"
            yield name, section
            yield from sections(section, f"{name}.")


def field_docstrings(cls: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, on one line.

    Raises:
        ValueError: a field has none.
    """
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            found[statement.target.id] = " ".join(following.value.value.split())
    for field in dataclasses.fields(cls):
        if field.name not in found:
            raise ValueError(f"{cls.__name__}.{field.name}: there is no docstring below the field")
    return found


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a key has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def default_text(field: dataclasses.Field[Any]) -> str | None:
    """A key's default as YAML and JSON write it; None for a section that has its own defaults."""
    assert not is_required(field)
    if field.default is not dataclasses.MISSING:
        return json.dumps(field.default, default=str)
    assert field.default_factory is not dataclasses.MISSING
    value = field.default_factory()
    return None if dataclasses.is_dataclass(value) else json.dumps(value, default=str)


def dataclass_of(annotation: Any) -> type | None:
    """The dataclass of a section's annotation, `X` or `X | None`."""
    for member in (annotation, *typing.get_args(annotation)):
        if isinstance(member, type) and dataclasses.is_dataclass(member):
            return member
    return None
