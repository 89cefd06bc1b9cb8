"""Scores of tasks, and the two benchmarks' averages of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from glue_tasks.answers import predicted
from glue_tasks.glue import GLUE
from glue_tasks.metrics import METRICS, Judged
from glue_tasks.superglue import SUPERGLUE
from glue_tasks.task import Example, Task

TASKS = (*GLUE, *SUPERGLUE)
BENCHMARKS = ("GLUE", "SuperGLUE")


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """How good the answers to a task's examples are."""

    task: Task
    metrics: Mapping[str, float]
    """Each of the task's metrics, a percentage."""
    examples: int
    answered: int
    """Responses in which an answer was found."""

    @property
    def score(self) -> float:
        """The mean of the metrics."""
        return fmean(self.metrics.values())


@dataclass(frozen=True, kw_only=True)
class Average:
    """A benchmark's average."""

    score: float
    tasks: tuple[str, ...]
    """What was averaged; tasks that count as one (MNLI's two) under one name."""
    missing: tuple[str, ...]
    """What the official average has besides; it is that average if there is none."""


def chosen_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks by name: all, a benchmark, `GLUE/RTE`, or `CoLA` where one benchmark has it.

    Raises:
        ValueError: a name that is none of these, or that both benchmarks have.
    """
    found: list[Task] = []
    for name in names:
        lowered = name.lower()
        matches = [
            task for task in TASKS if lowered in ("all", *(known.lower() for known in _names(task)))
        ]
        if not matches:
            raise ValueError(
                f"task {name}: there is none; choose of {', '.join(t.key for t in TASKS)}, or all, "
                f"{', '.join(BENCHMARKS)}"
            )
        if lowered != "all" and len({task.benchmark for task in matches}) > 1:
            raise ValueError(f"task {name}: choose of {', '.join(t.key for t in matches)}")
        found += [task for task in matches if task not in found]
    return sorted(found, key=TASKS.index)


def _names(task: Task) -> tuple[str, ...]:
    """What a task may be chosen by."""
    return (task.benchmark, task.key, task.name, *([task.part_of] if task.part_of else []))


def score_tasks(examples: Sequence[Example], responses: Sequence[str]) -> list[TaskScore]:
    """The scores of all tasks that the examples are of, in the leaderboards' order.

    Args:
        examples: of any tasks.
        responses: the text that answers each of them.
    """
    judged: dict[str, list[Judged]] = defaultdict(list)
    for example, response in zip(examples, responses, strict=True):
        found = predicted(response, example.answer)
        judged[example.task].append(Judged(answer=example.answer, found=found, unit=example.unit))
    return [
        TaskScore(
            task=task,
            metrics={name: METRICS[name](of_task, task.positive) for name in task.metrics},
            examples=len(of_task),
            answered=sum(one.found is not None for one in of_task),
        )
        for task in TASKS
        if (of_task := judged.get(task.key))
    ]


def average(benchmark: str, scores: Sequence[TaskScore]) -> Average | None:
    """The mean of a benchmark's tasks; None where none of them was scored.

    Of a task with several metrics their mean counts. Tasks that are parts of one count together as
    one (MNLI matched and mismatched), and diagnostics do not count.
    """
    counted = [s for s in scores if s.task.benchmark == benchmark and not s.task.is_diagnostic]
    parts: dict[str, list[float]] = defaultdict(list)
    for one in counted:
        parts[_counts_as(one.task)].append(one.score)
    if not parts:
        return None
    official = [t for t in TASKS if t.benchmark == benchmark and not t.is_diagnostic]
    have = {one.task.name for one in counted}
    return Average(
        score=fmean(fmean(of_part) for of_part in parts.values()),
        tasks=tuple(parts),
        missing=tuple(task.name for task in official if task.name not in have),
    )


def _counts_as(task: Task) -> str:
    return task.part_of or task.name
