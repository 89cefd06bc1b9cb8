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

import importlib.metadata
from collections.abc import Generator
from pathlib import Path
from typing import Any

from megatron_prefix.packages import is_installed, missing_line
from megatron_prefix.rollouts.gym.task_spec import EXTRA, TaskSpec, read_task_spec
from megatron_prefix.rollouts.record import FilePosition, Record
from megatron_prefix.rollouts.user_process import CallFailed, UserFunction

_AT_ONCE, _SECONDS = 100, 3600.0
"""Tasks that the process makes in a call, and how long that may take."""


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
        unlike = [_plain(read_task_spec(self.path.parent / other)) for other in spec.unlike]
        number = start.number
        maker = UserFunction(
            "megatron_prefix.rollouts.gym.task_maker:next_tasks",
            processes=1,
            timeout_s=_SECONDS,
            environment={"PYTHONHASHSEED": "0"},
        )
        try:
            while number < spec.size:
                made = maker(_plain(spec), unlike, start.number, _AT_ONCE)["object"]
                if "error" in made:
                    raise CallFailed(made["error"])
                for entry in made["entries"]:
                    source = f"{self.path}:{number}"
                    number += 1
                    answer = {"task": spec.task, "config": spec.config, "entry": entry}
                    yield Record(
                        values={"prompt": entry["question"], "answer": answer},
                        source=source,
                        end=FilePosition(offset=number, number=number),
                    )
        except CallFailed as error:
            raise ValueError(f"{self.path}: {error}") from error
        finally:
            maker.close()

    def can_continue_at(self, position: FilePosition) -> bool:
        """Whether there are as many tasks."""
        return position.number <= read_task_spec(self.path).size

    def count(self) -> int:
        """Its tasks; none is made."""
        return read_task_spec(self.path).size


def _plain(spec: TaskSpec) -> dict[str, Any]:
    return {"task": spec.task, "seed": spec.seed, "size": spec.size, "config": spec.config}
