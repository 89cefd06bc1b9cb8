"""The repository's Markdown files: their code blocks, the marks above these, their links."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_BLOCK = re.compile(
    r"^(?:(?P<mark_indent> *)<!-- (?P<mark>[^\n]*?) -->\n)?"
    r"(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"\]\((?P<target>[^()\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_EXTRAS = re.compile(r"\.(\[[\w,]+\])")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of code."""

    source: str
    """File and line of the fence, as failures name it."""
    language: str
    text: str
    """Without the block's indentation."""
    mark: str
    """Key of the HTML comment above it, such as "run by"; empty if there is none."""
    value: str
    """What stands after the mark's key and colon."""


def markdown_files() -> list[Path]:
    """All Markdown files but those in hidden folders and in outputs/."""
    found = []
    for path in sorted(ROOT.rglob("*.md")):
        folders = path.relative_to(ROOT).parts[:-1]
        if not any(name.startswith(".") or name == "outputs" for name in folders):
            found.append(path)
    return found


def blocks(text: str, name: str) -> list[Block]:
    """The fenced blocks of a Markdown text.

    Args:
        text: the file's.
        name: of the file, for messages.
    """
    found = []
    for match in _BLOCK.finditer(text):
        key, _, value = (match["mark"] or "").partition(":")
        line = text.count("\n", 0, match.start("language")) + 1
        found.append(
            Block(
                source=f"{name}:{line}",
                language=match["language"],
                text=textwrap.dedent(match["text"]),
                mark=key.strip(),
                value=value.strip(),
            )
        )
    return found


def without_code(text: str) -> str:
    """The text without its fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", _BLOCK.sub("", text))


def broken_links(text: str, path: Path) -> list[str]:
    """Links to files or headings that are not there; other sites are not looked at."""
    broken = []
    for match in _LINK.finditer(without_code(text)):
        target = match["target"]
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file
        if not found.exists():
            broken.append(f"{target}: there is no such file")
        elif anchor:
            headings = anchors(found.read_text(encoding="utf-8") if file else text)
            if anchor not in headings:
                broken.append(f"{target}: there is no such heading")
    return broken


def anchors(text: str) -> set[str]:
    """The names by which GitHub links to headings."""
    headings = _HEADING.findall(_BLOCK.sub("", text))
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a shell block, without comments and NAME=value in front."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):
            del words[0]
        if words:
            yield words


def is_mentioned(words: list[str], text: str) -> bool:
    """Whether a script or test that has this text runs the program of a command.

    The program is a script (with its subcommand, if there is any), a module, or pip with the extras
    that it installs.
    """
    if words[0] == "pip":
        extras = _EXTRAS.findall(" ".join(words))
        return all(extra in text for extra in extras) and "pip install" in text
    if "-m" in words:
        return words[words.index("-m") + 1] in text
    script = next(i for i, word in enumerate(words) if re.search(r"\.(py|sh)$", word))
    if Path(words[script]).stem not in text:
        return False
    following = words[script + 1 : script + 2]
    return not (following and re.fullmatch(r"[a-z][a-z-]+", following[0])) or following[0] in text
