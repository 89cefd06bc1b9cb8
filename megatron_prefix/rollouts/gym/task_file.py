"""A file that names tasks of reasoning-gym, read like a file of records.

    task: chain_sum                    # a data set of reasoning-gym
    seed: 0
    size: 1000
    config: {min_terms: 2, max_terms: 3}
    unlike: [unseen.gym.yaml]          # none of the questions that these files ask

A record has the question as its `prompt` and, as its `answer`, what the reward `reasoning_gym`
scores with. reasoning-gym makes a task of its seed and its number, and needs no download.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from megatron_prefix.packages import is_installed, missing_line
from megatron_prefix.rollouts.gym.task_spec import EXTRA, TaskSpec, read_task_spec
from megatron_prefix.rollouts.record import FilePosition, Record


def library_version() -> str:
    """Of reasoning-gym, by which tasks may differ; empty where it is not installed."""
    try:
        return importlib.metadata.version("reasoning-gym")
    except importlib.metadata.PackageNotFoundError:
        return ""


class TaskFile:
    """A `RecordFile` of the tasks that a file names, made by a process of their own.

    Some data sets go through sets of text, whose order Python draws anew in each process. The
    process that makes tasks has a fixed order, so that all ranks, and a run that resumes, get the
    same ones.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(
        self, start: FilePosition, *, as_arrays: bool = False
    ) -> Generator[Record, None, None]:
        """The tasks from `start` on."""
        spec = read_task_spec(self.path)
        if not is_installed("reasoning_gym"):
            raise ValueError(missing_line(str(self.path), "reasoning-gym", EXTRA))
        message = {
            "spec": _plain(spec),
            "unlike": [_plain(read_task_spec(self.path.parent / other)) for other in spec.unlike],
            "start": start.number,
        }
        with _started(message) as maker:
            number = start.number
            for line in maker.stdout or ():
                made = json.loads(line)
                if "error" in made:
                    raise ValueError(f"{self.path}: {made['error']}")
                source = f"{self.path}:{number}"
                number += 1
                answer = {"task": spec.task, "config": spec.config, "entry": made["entry"]}
                yield Record(
                    values={"prompt": made["entry"]["question"], "answer": answer},
                    source=source,
                    end=FilePosition(offset=number, number=number),
                )
            if number < spec.size:
                raise ValueError(
                    f"{self.path}: the process that makes its tasks ended after {number} of "
                    f"{spec.size} (exit status {maker.wait()}); what it said stands above"
                )

    def can_continue_at(self, position: FilePosition) -> bool:
        """Whether there are as many tasks."""
        return position.number <= read_task_spec(self.path).size

    def count(self) -> int:
        """Its tasks; none is made."""
        return read_task_spec(self.path).size


def _plain(spec: TaskSpec) -> dict[str, Any]:
    return {"task": spec.task, "seed": spec.seed, "size": spec.size, "config": spec.config}


@contextlib.contextmanager
def _started(message: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """The process that makes tasks; it ends with the block."""
    root = Path(__file__).resolve().parents[3]
    path = [str(root), *(entry or os.getcwd() for entry in sys.path)]
    maker = subprocess.Popen(
        [sys.executable, "-m", "megatron_prefix.rollouts.gym.task_maker", json.dumps(message)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONHASHSEED": "0"},
    )
    assert maker.stdout is not None
    try:
        yield maker
    finally:
        maker.kill()
        maker.stdout.close()
        maker.wait()
