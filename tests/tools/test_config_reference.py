"""The table of a run's keys is what the config says."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "config_reference.py"
sys.path.insert(0, str(TOOL.parent))

import config_reference  # noqa: E402


def test_the_committed_table_is_what_the_docstrings_say():
    process = subprocess.run(
        [sys.executable, TOOL, "--check"], capture_output=True, text=True, timeout=120
    )
    # Its message says how to write the table anew.
    assert process.returncode == 0, process.stderr


def test_a_changed_docstring_makes_the_table_stale():
    text = config_reference.README.read_text(encoding="utf-8")
    changed = text.replace("Learning rate after the warm-up.", "Learning rate.")
    assert changed != text
    assert config_reference.with_reference(changed) == text


def test_every_section_and_key_of_a_run_has_a_row():
    text = config_reference.README.read_text(encoding="utf-8")
    found = dict(config_reference.sections(config_reference.RunConfig))
    assert {"model", "objective", "rollouts.server", "model.yarn"} <= found.keys()
    for name, section in found.items():
        table = text.partition(f"\n## `{name}`\n")[2].partition("\n## ")[0]
        for key in config_reference.field_docstrings(section):
            assert f"\n| `{key}` | " in table


@dataclass(frozen=True, kw_only=True)
class Undocumented:
    """A section whose second key nobody has described."""

    first: int = 1
    """The first."""
    second: int = 2


def test_a_key_without_a_docstring_is_named():
    with pytest.raises(ValueError, match=r"Undocumented\.second: there is no docstring"):
        config_reference.field_docstrings(Undocumented)
