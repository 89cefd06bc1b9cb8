"""The process that makes tasks of reasoning-gym; started by `task_file`, never imported by it.

Each task goes out as a line of JSON; whatever the library prints goes to standard error.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO


def main(message: dict[str, Any]) -> None:
    """Write the tasks that the message asks for.

    Args:
        message: `spec` of the tasks, the specs whose questions are not asked (`unlike`), and the
            number of the first task that is written (`start`).
    """
    lines = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        for number, entry in enumerate(_entries(message["spec"], message["unlike"])):
            if number == message["start"]:
                _check_survives_json(message["spec"]["task"], entry)
            if number >= message["start"]:
                _write(lines, {"entry": entry})
    # The library checks options by assertions, and Python names unknown ones by a TypeError.
    except Exception as error:
        _write(lines, {"error": _described(error)})


def _entries(spec: dict[str, Any], unlike: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """`spec["size"]` tasks, none of whose questions the specs of `unlike` ask."""
    import reasoning_gym

    def made(of: dict[str, Any], numbers: range) -> Iterator[dict[str, Any]]:
        names = sorted(reasoning_gym.factory.DATASETS)
        if of["task"] not in names:
            raise ValueError(
                f"task: {of['task']}: reasoning-gym has no such data set; it has {', '.join(names)}"
            )
        data = reasoning_gym.create_dataset(
            of["task"], seed=of["seed"], size=numbers.stop, **of["config"]
        )
        return (data[i] for i in numbers)

    asked = {entry["question"] for other in unlike for entry in made(other, range(other["size"]))}
    if not asked:
        yield from made(spec, range(spec["size"]))
        return
    # Others come in the place of those that are left out, from numbers that no task has.
    tries = 10 * spec["size"]
    new = (e for e in made(spec, range(tries)) if e["question"] not in asked)
    count = 0
    for entry in itertools.islice(new, spec["size"]):
        count += 1
        yield entry
    if count < spec["size"]:
        raise ValueError(
            f"size: {spec['size']}: of {tries} tasks only {count} ask what the files of unlike do "
            "not; lower size, or make the tasks more varied by config"
        )


def _check_survives_json(task: str, entry: dict[str, Any]) -> None:
    """Refuse tasks that their own scorer would not know again."""
    import reasoning_gym

    score = reasoning_gym.get_score_answer_fn(task)
    read = json.loads(json.dumps(entry))
    if score(entry["answer"], read) != score(entry["answer"], entry):
        raise ValueError(
            f"task: {task}: its tasks are not the same after they were written as JSON, and their "
            "answers would be scored wrongly; choose another data set"
        )


def _write(lines: BinaryIO, message: dict[str, Any]) -> None:
    lines.write(json.dumps(message).encode() + b"\n")
    lines.flush()


def _described(error: Exception) -> str:
    if isinstance(error, ValueError):
        return str(error)
    return f"reasoning-gym refuses it: {type(error).__name__}: {error}"


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
