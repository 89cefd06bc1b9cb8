"""What a run's configuration asks of files of tasks, before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_prefix.config import RunConfig
from megatron_prefix.rollouts.gym.task_spec import TaskSpec, read_task_spec
from megatron_prefix.rollouts.names import is_task_file


def task_files(config: RunConfig) -> dict[str, list[Path]]:
    """The files of tasks that a run trains and evaluates on, by their key."""
    found = {"rollouts.paths": [path for path in config.rollouts.paths if is_task_file(path)]}
    evaluation = config.evaluation
    if evaluation is not None:
        paths = [path for of_one in evaluation.data_sets.values() for path in of_one]
        found["evaluation.paths"] = [path for path in paths if is_task_file(path)]
    return found


def faults_of_tasks(config: RunConfig) -> Iterator[str]:
    """A line for each thing that is wrong with the files of tasks, which are there."""
    specs: dict[str, dict[Path, TaskSpec]] = {}
    for key, paths in task_files(config).items():
        specs[key] = {}
        for path in paths:
            if config.rollouts.text is None:
                yield f"{key}: {path}: tasks are text; set rollouts.text.tokenizer"
            if config.rollouts.engine == "file" and key == "rollouts.paths":
                yield (
                    f"{key}: {path}: tasks have no responses; set rollouts.engine to one that "
                    "samples, such as embedded"
                )
            try:
                specs[key][path] = read_task_spec(path)
            except (ValueError, OSError) as error:
                yield from (f"{key}: {line}" for line in str(error).splitlines())
    for path, trained in specs["rollouts.paths"].items():
        for other, unseen in specs.get("evaluation.paths", {}).items():
            left_out = {(path.parent / name).resolve() for name in trained.unlike}
            if trained.meets(unseen) and other.resolve() not in left_out:
                yield (
                    f"evaluation.paths: {other}: has tasks that {path} trains on: reasoning-gym "
                    f"makes task i of seed + i; set its seed to {trained.seed + trained.size} or "
                    f"more, and name it in unlike of {path}"
                )
