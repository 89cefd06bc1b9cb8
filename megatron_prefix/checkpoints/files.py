"""The folders of a run's checkpoints on the disk: names, completeness, removal. No process groups.

    checkpoints/
      step_000010/              weights, optimizer, schedule, random states; trainer.json
      step_000020.3f9c.partial/ being written, being removed, or cut off: never read
      step_000030.damaged/      found incomplete when the run was to continue from it
      reference/                weights of the reference policy, where a KL term needs one
      reference_000020/         those that it has from step 20 on

A folder is written under a name of its own and renamed when it is complete and on the disk, so a
name without `.partial` is complete, whenever the run is killed. Removal renames first, too.
`trainer.json` lists the other files and their sizes, which tells a folder that has lost some since.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

_STEP_NAME = re.compile(r"step_(\d{6,})")
_REFERENCE_NAME = re.compile(r"reference(?:_(\d{6,}))?")
_STATE = "trainer.json"
_TRIAL_BYTES = 2**20


def step_path(directory: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return directory / f"step_{step:06d}"


def complete_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    if not directory.is_dir():
        return []
    names = (_STEP_NAME.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in names if match)


def reference_path(directory: Path, step: int) -> Path:
    """The folder of the reference weights that were taken at a step; 0 is the start."""
    return directory / (f"reference_{step:06d}" if step else "reference")


def reference_steps(directory: Path) -> list[int]:
    """Steps at which reference weights that are there were taken, ascending."""
    if not directory.is_dir():
        return []
    names = (_REFERENCE_NAME.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match[1] or 0) for match in names if match)


def begin(path: Path) -> Path:
    """Make the folder that becomes `path`; no two attempts share one.

    A process of a run that was killed may still write for a moment.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir(parents=True)
    return partial


def write_problem(folder: Path) -> OSError | None:
    """Why nothing more can be written to a folder, where a library only says that it failed."""
    trial = folder / "trial"
    try:
        trial.write_bytes(bytes(_TRIAL_BYTES))
        _sync(trial)
        trial.unlink()
    except OSError as error:
        return error
    return None


def complete(partial: Path, path: Path, state: dict[str, Any]) -> None:
    """Add the trainer's state, have everything on the disk, and give the folder its name."""
    files = {
        str(file.relative_to(partial)): file.stat().st_size
        for file in sorted(partial.rglob("*"))
        if file.is_file()
    }
    text = json.dumps({**state, "files": files}, indent=1, default=str)
    (partial / _STATE).write_text(text, encoding="utf-8")
    for entry in [*partial.rglob("*"), partial]:
        _sync(entry)
    if path.exists():
        remove(path)
    os.replace(partial, path)
    _sync(path.parent)


def read_state(path: Path) -> dict[str, Any]:
    """What `complete` was given."""
    return json.loads((path / _STATE).read_text(encoding="utf-8"))


def damage(path: Path) -> str | None:
    """What a complete checkpoint has lost since it was written; None where nothing is missing.

    Raises:
        OSError: the disk does not answer, which says nothing about the checkpoint.
    """
    try:
        state = read_state(path)
    except FileNotFoundError:
        return f"{_STATE} is missing"
    except ValueError:
        return f"{_STATE} is cut off"
    for name, size in state.get("files", {}).items():
        try:
            found = (path / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
    return None


def set_damaged_aside(directory: Path) -> list[str]:
    """Rename damaged checkpoints to `.damaged` if a whole one is older than they are.

    Returns:
        What is damaged about each that was renamed.

    Raises:
        ValueError: no checkpoint is whole.
    """
    steps = complete_steps(directory)
    found = []
    for step in reversed(steps):
        path = step_path(directory, step)
        if (reason := damage(path)) is None:
            break
        found.append((path, reason))
    if steps and len(found) == len(steps):
        reasons = "; ".join(f"{path}: {reason}" for path, reason in found)
        raise ValueError(
            f"no checkpoint is whole to continue from: {reasons}. Restore it from a copy, or set "
            "output.resume: false to start anew (the folder is renamed, not removed)"
        )
    for path, _ in found:
        aside = path.with_name(path.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
    return [f"{path}: {reason}" for path, reason in found]


def remove(path: Path) -> None:
    """Remove a checkpoint; cut off in the middle, it is no longer taken for one."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    os.replace(path, partial)
    shutil.rmtree(partial, ignore_errors=True)


def remove_partial(directory: Path) -> None:
    """Remove what was cut off."""
    for leftover in directory.glob("*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Have `write` write a file, which is then there as a whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        write(file)
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
