"""Imports within the package run one way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import megatron_prefix

PACKAGE = Path(megatron_prefix.__file__).parent
ORDER = [
    {"device_copy", "lazy_names", "packages", "system_errors"},
    {"layout"},
    {"attention", "objective"},
    {"config"},
    {"megatron"},
    {"distributed"},
    {"layers"},
    {"layer_spec"},
    {"model"},
    {"planning"},
    {"checkpoints"},
    {"conversion"},
    {"rollouts"},
    {"training"},
    {"integrations"},
    {"__main__"},
]
"""Each imports what stands before it; no two on one line import each other."""


def _imported(file: Path) -> Iterator[str]:
    """First names, below the package, of what a file imports from it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names = [node.module or ""]
            if node.module == PACKAGE.name:
                names = [f"{PACKAGE.name}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            if package == PACKAGE.name and rest:
                yield rest[0]


def test_what_stands_first_imports_nothing_of_what_follows() -> None:
    rank = {name: place for place, names in enumerate(ORDER) for name in names}
    found = 0
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts == ("__init__",):
            continue
        for name in _imported(file):
            found += 1
            above = rank[name] < rank[parts[0]] or name == parts[0]
            assert above, f"{file.relative_to(PACKAGE)} imports {name}, which comes after it"
    assert found > 300
