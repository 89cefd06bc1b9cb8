"""`megatron-prefix`, or `python -m megatron_prefix`: every command by its name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prefix.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
SAYS = {
    "train": "--check",
    "convert": "usage: megatron-prefix convert",
    "plan": "data-parallel ranks (default: 1)",
    "verify": "it decides the tolerances (default: float64)",
    "show": "the picture to write (default: outputs/layout.png)",
}


def _command(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_prefix", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )


def test_help_names_every_command_and_an_unknown_one_is_answered_with_them() -> None:
    done = _command("--help")
    assert done.returncode == 0
    for name, (_, summary) in COMMANDS.items():
        assert f"  {name:<7}  {summary}\n" in done.stdout
    done = _command("trian")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line == f"megatron-prefix: trian is none of its commands: {', '.join(COMMANDS)}"
    done = _command()
    assert done.returncode == 2 and done.stderr.startswith("usage: megatron-prefix COMMAND")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does(name: str) -> None:
    done = _command(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert SAYS[name] in " ".join(done.stdout.split())


def test_a_command_does_what_its_tool_does(tmp_path: Path) -> None:
    shapes = tmp_path / "shapes.yaml"
    shapes.write_text("[{prefix: 6, responses: [3, 2]}]")
    done = _command("show", "--shapes", str(shapes), "--out", str(tmp_path / "layout.png"))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/layout.png\n"), done.stderr
    assert (tmp_path / "layout.png").stat().st_size > 1000
    done = _command("train", str(tmp_path / "nowhere.yaml"))
    assert done.returncode == 2 and "cannot be read: No such file" in done.stderr


def test_without_the_repository_a_tool_is_named_and_where_it_is(tmp_path: Path) -> None:
    package = tmp_path / "megatron_prefix"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text((ROOT / "megatron_prefix/__main__.py").read_text())
    done = subprocess.run(
        [sys.executable, str(package / "__main__.py"), "plan"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("megatron-prefix: plan is tools/plan.py of the repository, and there is")
