"""Write every key of a run's file into a table: type, default and meaning.

    python tools/config_reference.py            writes megatron_prefix/config/README.md anew
    python tools/config_reference.py --check    only says whether that file is what this would write

Keys, types and defaults are those of the dataclasses that read the file, and the meaning is the
docstring below each field. Text above the marker in the README is kept as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import typing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_prefix.config import RunConfig
from megatron_prefix.config.reference import (
    dataclass_of,
    default_text,
    field_docstrings,
    is_required,
    sections,
)
from megatron_prefix.config.wording import described

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "megatron_prefix" / "config" / "README.md"
MARKER = "<!-- Below this line: python tools/config_reference.py -->"


def main() -> int:
    """Command line; 1 if the file is checked and is not up to date."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    before = README.read_text(encoding="utf-8")
    after = with_reference(before)
    if args.check and before != after:
        print(
            f"{README.relative_to(REPOSITORY)} is not what the config's docstrings say; run "
            "python tools/config_reference.py",
            file=sys.stderr,
        )
        return 1
    if before != after:
        README.write_text(after, encoding="utf-8")
    return 0


def with_reference(text: str) -> str:
    """The README with the tables of all sections below its marker."""
    intro, marker, _ = text.partition(MARKER)
    if not marker:
        raise ValueError(f"{README}: the line {MARKER} is missing")
    tables = "\n\n".join(_table(name, section) for name, section in sections(RunConfig))
    return f"{intro}{MARKER}\n\n{tables}\n"


def _table(name: str, cls: type) -> str:
    docstrings = field_docstrings(cls)
    annotations = typing.get_type_hints(cls)
    rows = []
    for field in dataclasses.fields(cls):
        cells = (
            f"`{field.name}`",
            _type(annotations[field.name], f"{name}.{field.name}"),
            _default(field),
            docstrings[field.name],
        )
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    summary, *more = (inspect.getdoc(cls) or "").split("\n\n")
    # Examples and errors are for readers of the code.
    prose = [summary, *(text for text in more if not text.startswith(("Example", "Raises")))]
    table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows]
    paragraphs = [" ".join(text.split()) for text in prose]
    return "\n\n".join([f"## `{name}`", *paragraphs, "\n".join(table)])


def _type(annotation: Any, path: str) -> str:
    section = dataclass_of(annotation)
    if section is None:
        return described(annotation).replace("bool (true or false)", "bool")
    return f"section, see [`{path}`](#{path.replace('.', '')})"


def _default(field: dataclasses.Field[Any]) -> str:
    if is_required(field):
        return "required"
    text = default_text(field)
    return "its defaults" if text is None else f"`{text}`"


if __name__ == "__main__":
    sys.exit(main())
