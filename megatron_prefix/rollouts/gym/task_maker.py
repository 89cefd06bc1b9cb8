"""Makes tasks of reasoning-gym, in a process of their own (see `task_file`)."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from typing import Any


def next_tasks(
    spec: dict[str, Any], unlike: list[dict[str, Any]], start: int, count: int
) -> dict[str, Any]:
    """The next tasks that a spec names: `entries`, or `error`, which says what is wrong.

    Args:
        spec: of the tasks.
        unlike: specs whose questions are not asked.
        start: number of the first task that was ever asked for.
        count: tasks at most.
    """
    try:
        entries = list(itertools.islice(_begun(json.dumps([spec, unlike, start])), count))
        json.dumps(entries)
        return {"entries": entries}
    # The library checks options by assertions, and Python names unknown ones by a TypeError.
    except Exception as error:
        is_ours = isinstance(error, ValueError)
        described = f"reasoning-gym refuses it: {type(error).__name__}: {error}"
        return {"error": str(error) if is_ours else described}


@functools.lru_cache(maxsize=1)
def _begun(text: str) -> Iterator[dict[str, Any]]:
    """What is left of the tasks that a text in JSON asks for."""
    spec, unlike, start = json.loads(text)
    entries = itertools.islice(_entries(spec, unlike), start, None)
    first = next(entries, None)
    if first is None:
        return entries
    _check_survives_json(spec["task"], first)
    return itertools.chain([first], entries)


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
