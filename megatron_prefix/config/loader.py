"""From a YAML file to nested dataclasses, strictly, and back.

The dataclasses say everything: their field names are the keys, their annotations the types, a field
without a default is required. Nothing is guessed: a wrong key or value is a `ConfigError` that
names it by its dotted key (`training.token_budget`). All faults of a file are found at once.

Understood are int, float, bool, str, pathlib.Path, Any, Literal, `X | None` and other unions,
list[X], tuple[X, ...], dict[str, X] and dataclasses of these.

YAML is read as version 1.1 by the safe loader, with two differences: a key that is there twice is
an error, and 1e-4 is a number, as in version 1.2. A float is finite: .inf and .nan are errors.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from megatron_prefix.config.reference import is_required
from megatron_prefix.config.wording import (
    join,
    located,
    quoting,
    refusal,
    shown,
    suggestion,
)

Config = TypeVar("Config")

_EXPONENT_FLOAT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and its value.

    Attributes:
        faults: what is wrong, each in one line; the message is these lines.
    """

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


def load_yaml(path: str | Path, cls: type[Config], overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file into a dataclass.

    Args:
        path: the file. An empty one is a mapping without keys.
        cls: the dataclass of the whole file.
        overrides: `section.key=value`, where the value is YAML; each replaces or adds what the
            file says, and of two for the same key the last one holds.

    Raises:
        ConfigError: the file is no YAML mapping, or does not fit `cls`; the message does not name
            the file, which the caller knows.
        OSError: the file cannot be read.
    """
    return load_dataclass(cls, read_values(path, overrides))


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a YAML file with overrides; see `load_yaml` for both and for errors."""
    values = read_yaml(path)
    for override in overrides:
        apply_override(values, override)
    return values


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that is a mapping, as plain values.

    Raises:
        ConfigError: not UTF-8, not YAML, not a mapping, or a key that is there twice, naming the
            line.
        OSError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"not a text file in UTF-8: {error}") from error
    values = _parse(text)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"the file is not a mapping of keys to values but {shown(values)}")
    return values


def load_dataclass(cls: type[Config], mapping: Mapping[str, Any], *, path: str = "") -> Config:
    """Convert plain values into a dataclass, checking every key and type.

    Args:
        cls: a dataclass.
        mapping: its fields by name; nested dataclasses are mappings too.
        path: dotted key of the mapping, put in front of every key in errors.

    Raises:
        ConfigError: unknown and missing keys, and values that are not of their field's type or not
            one of its choices: all of them. Where there are none, what the dataclass's own checks
            refuse by a ValueError.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(refusal(path, mapping, cls))
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    faults = [
        f"{join(path, key)}: unknown key; {suggestion(key, mapping[key], cls)}"
        for key in mapping
        if key not in fields
    ]
    missing = [name for name, field in fields.items() if is_required(field) and name not in mapping]
    if missing:
        keys = ", ".join(join(path, name) for name in missing)
        faults.append(f"{keys}: required, but not set")
    annotations = typing.get_type_hints(cls)
    items = {
        key: (annotations[key], value, join(path, key))
        for key, value in mapping.items()
        if key in fields
    }
    values = _convert_all(items, faults)
    try:
        return cls(**values)
    except ValueError as error:
        own = error.faults if isinstance(error, ConfigError) else (str(error),)
        raise ConfigError(*(located(path, fault, fields) for fault in own)) from error


def dump_yaml(config: Any) -> str:
    """Write a dataclass as YAML that `load_yaml` reads as an equal one.

    Within Any, tuples come back as lists.

    Raises:
        ConfigError: a value that YAML has no form for, within Any.
    """
    try:
        return yaml.dump(
            _plain(config),
            Dumper=_Dumper,
            sort_keys=False,
            default_flow_style=None,
            allow_unicode=True,
            width=100,
        )
    except yaml.YAMLError as error:
        raise ConfigError(f"not representable as YAML: {error}") from error


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a mapping's second use of a key."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        # Here, where the keys that << merges in have not joined yet: those may be overridden.
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(
                        problem=f"the key {key.value} is there twice", problem_mark=key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what only `_Loader` reads as a number, and writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_dict(self, data: Mapping[str, Any]) -> yaml.MappingNode:
        # A key per line; lists of plain values stay on one (default_flow_style=None).
        return self.represent_mapping("tag:yaml.org,2002:map", data, flow_style=False)

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML loses Unicode's line breaks in any style but the one that escapes them.
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)
_Dumper.add_representer(dict, _Dumper.represent_dict)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(f"^(?:{_EXPONENT_FLOAT.pattern})$"),
        list("-+.0123456789"),
    )


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{where}{error.problem or error.context}") from error
    # The constructors of dates and numbers raise plain ValueErrors; nesting may be too deep.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"not readable as YAML: {error}") from error


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set a dotted key, `section.key=value`, in plain values.

    Raises:
        ConfigError: it is not written like that, or a key on the way is no section.
    """
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    try:
        value = _parse(text)
    except ConfigError as error:
        raise ConfigError(
            f"override {override!r}: the value is not YAML: {error}; text that begins with * or & "
            "needs quotes"
        ) from error
    section = values
    for depth, key in enumerate(keys[:-1], start=1):
        # A section may be absent or null in the file.
        if section.get(key) is None:
            section[key] = {}
        if not isinstance(section[key], dict):
            raise ConfigError(
                f"override {override!r}: {'.'.join(keys[:depth])} is {shown(section[key])}, which "
                "has no keys of its own"
            )
        # Where the file has an alias, another section is the same object.
        section[key] = dict(section[key])
        section = section[key]
    section[keys[-1]] = value


def _convert(annotation: Any, value: Any, path: str) -> Any:
    """A plain value as an annotation wants it."""
    origin = get_origin(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(annotation, value, path)
    if origin is Literal:
        for choice in get_args(annotation):
            if type(choice) is type(value) and choice == value:
                return choice
        raise ConfigError(refusal(path, value, annotation))
    if origin in (list, tuple):
        return _convert_sequence(annotation, value, path)
    if origin is dict:
        return _convert_dict(annotation, value, path)
    if dataclasses.is_dataclass(annotation):
        return load_dataclass(annotation, value, path=path)
    if annotation is Path:
        if isinstance(value, (str, Path)) and str(value):
            return Path(value)
        raise ConfigError(refusal(path, value, annotation))
    if annotation is float:
        return _convert_float(value, path)
    if annotation in (int, bool, str, types.NoneType):
        # By identity: a bool is an int to isinstance.
        if type(value) is annotation:
            return value
        raise ConfigError(refusal(path, value, annotation))
    raise TypeError(f"{path}: no conversion to {annotation!r}")


_Key = TypeVar("_Key")


def _convert_all(
    items: Mapping[_Key, tuple[Any, Any, str]], faults: Sequence[str] = ()
) -> dict[_Key, Any]:
    """Convert every (annotation, value, path), or raise for all that cannot be.

    Args:
        items: by a key that the results keep.
        faults: what has been found before; any ends in an error.
    """
    values: dict[_Key, Any] = {}
    errors = [ConfigError(*faults)] if faults else []
    for key, item in items.items():
        try:
            values[key] = _convert(*item)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigError(*(fault for error in errors for fault in error.faults))
    return values


def _convert_float(value: Any, path: str) -> float:
    if type(value) in (int, float):
        try:
            number = float(value)
        except OverflowError:
            raise ConfigError(refusal(path, value, float)) from None
    # What a YAML 1.1 loader, or a shell, made text of.
    elif isinstance(value, str) and _EXPONENT_FLOAT.fullmatch(value):
        number = float(value)
    else:
        raise ConfigError(refusal(path, value, float))
    if math.isfinite(number):
        return number
    raise ConfigError(refusal(path, value, float))


def _convert_union(annotation: Any, value: Any, path: str) -> Any:
    if value is None and types.NoneType in get_args(annotation):
        return None
    members = [member for member in get_args(annotation) if member is not types.NoneType]
    shaped = [member for member in members if _has_shape(member, value)]
    if len(members) == 1 or len(shaped) == 1:
        # Its own error says more, a nested key for example.
        return _convert((shaped or members)[0], value, path)
    for member in members:
        try:
            return _convert(member, value, path)
        except ConfigError:
            continue
    raise ConfigError(refusal(path, value, annotation))


def _has_shape(annotation: Any, value: Any) -> bool:
    """Whether both are a list, or both a mapping, whatever they hold."""
    origin = get_origin(annotation)
    if isinstance(value, Mapping):
        return origin is dict
    return isinstance(value, (list, tuple)) and origin in (list, tuple)


def _convert_sequence(annotation: Any, value: Any, path: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(refusal(path, value, annotation))
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is list or members[1:] == (...,):
        members = (members[0],) * len(value)
    elif len(members) != len(value):
        raise ConfigError(refusal(path, value, annotation))
    items = {
        i: (member, item, f"{path}[{i}]")
        for i, (member, item) in enumerate(zip(members, value, strict=True))
    }
    return origin(_convert_all(items).values())


def _convert_dict(annotation: Any, value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(refusal(path, value, annotation))
    faults = [
        f"{join(path, key)}: the key is not text; {quoting(key)}"
        for key in value
        if not isinstance(key, str)
    ]
    member = get_args(annotation)[1]
    items = {key: (member, item, join(path, key)) for key, item in value.items()}
    return _convert_all(items, faults)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {
            field.name: _plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.init
        }
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
