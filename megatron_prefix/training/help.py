"""What `--help` says: how a run is started, and every key of its file by name."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator

from megatron_prefix.config import RunConfig
from megatron_prefix.config.loader import ConfigError
from megatron_prefix.config.reference import (
    dataclass_of,
    default_text,
    field_docstrings,
    is_required,
    sections,
)
from megatron_prefix.config.wording import described

USAGE = "torchrun --nproc-per-node N -m megatron_prefix.training run.yaml [section.key=value ...]"
_WIDTH = 100

_TEXT = """\
usage: {usage}

Train as a YAML file says; overrides replace or add single keys of it. Without torchrun it is one
process: python -m megatron_prefix.training run.yaml

  run.yaml            the run's configuration
  section.key=value   for example optimizer.lr=1e-5; the value is YAML
  --check             read all records, build the model and all else that the run needs, say what
                      was found, and end; nothing is trained or written
  --help [KEY]        this text, or a section (--help rollouts), or a key (--help optimizer.lr)

sections of run.yaml, those with * must be there:
{sections}

A run that is started again goes on from its newest checkpoint in output.directory. SIGTERM, SIGUSR1
and Ctrl-C have it finish its step, save and end with status 0. Status 1: an error, 2: a wrong
configuration.
"""


def help_text(name: str | None = None) -> str:
    """The overview, or what is known of a section or key.

    Args:
        name: a dotted key.

    Raises:
        ConfigError: there is no such section or key.
    """
    if name is None:
        return _TEXT.format(usage=USAGE, sections="\n".join(_overview()))
    found = dict(sections(RunConfig))
    section, _, key = name.rpartition(".")
    if name in found:
        keys: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(found[name]))
        intro = [f"{name}: {_summary(found[name])}", ""]
    elif section in found and key in {field.name for field in dataclasses.fields(found[section])}:
        keys, intro, name = (key,), [], section
    else:
        raise ConfigError(
            f"--help {name}: there is no such section or key; sections: {', '.join(found)}"
        )
    lines = [line for key in keys for line in _key(name, found[name], key)]
    return "\n".join([*intro, *lines, ""])


def _overview() -> Iterator[str]:
    for field in dataclasses.fields(RunConfig):
        section = dataclass_of(typing.get_type_hints(RunConfig)[field.name])
        assert section is not None
        mark = "*" if is_required(field) else " "
        yield f"  {mark} {field.name:<12} {_summary(section)}"


def _summary(section: type) -> str:
    return (inspect.getdoc(section) or "").split("\n\n")[0].replace("\n", " ")


def _key(path: str, section: type, key: str) -> Iterator[str]:
    """A key's name, type and default on a line, and what it means below."""
    (field,) = [field for field in dataclasses.fields(section) if field.name == key]
    annotation = typing.get_type_hints(section)[key]
    name = f"{path}.{key}"
    if dataclass_of(annotation) is not None:
        kind = f"a section, see --help {name}"
    else:
        kind = described(annotation)
    default = None if is_required(field) else default_text(field)
    how = "must be set" if is_required(field) else "" if default is None else f"default {default}"
    yield f"{name}: {kind}{', ' if how else ''}{how}"
    yield from textwrap.wrap(
        field_docstrings(section)[key],
        width=_WIDTH,
        initial_indent="    ",
        subsequent_indent="    ",
        break_on_hyphens=False,
    )
