"""What a task is, and how the lines of its files become prompts with answers."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glue_tasks.data_files import WITHHELD, DataError, Row, json_lines, tab_separated


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt and what is right."""

    task: str
    """The task's key."""
    source: str
    """File and line."""
    prompt: str
    answer: Mapping[str, Any]
    """`choices` and `answer`; of a score `number` and `largest`; of a name out of a text `choices`
    and `answers`."""
    unit: str
    """What is judged together: the question of an option in MultiRC, the pair in AX-g; else the
    source."""

    def record(self) -> dict[str, Any]:
        """As a line of a run's prompt file."""
        return {"prompt": self.prompt, "answer": dict(self.answer), "task": self.task}


def as_it_is(row: Row) -> Iterable[Row]:
    """The one question of a line that holds one."""
    return (row,)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of GLUE or SuperGLUE."""

    name: str
    """As the leaderboards call it."""
    benchmark: str
    """GLUE or SuperGLUE."""
    files: Mapping[str, str]
    """Split (train, dev) to its file, below the benchmark's folder."""
    template: str
    """Text of the prompt, with fields in braces."""
    fields: tuple[str, ...]
    """Fields of a question that the template names."""
    label: str = "label"
    """Field with what is right."""
    labels: Mapping[str, str]
    """Label in the file (true, false and numbers as JSON writes them) to the word that answers."""
    positive: str = "yes"
    """The word of the class whose F1 is taken."""
    metrics: tuple[str, ...]
    """Of `metrics.METRICS`; the task's score is their mean."""
    part_of: str | None = None
    """Tasks of one name here count as one in the benchmark's average; None: by itself."""
    is_diagnostic: bool = False
    """Reported, and no part of the average."""
    columns: tuple[str, ...] | None = None
    """Of a tab-separated file without a header."""
    has_broken_lines: bool = False
    """The official file has a few wrong lines, which are passed over."""
    unit: str | None = None
    """Field of what is judged together; None: each question by itself."""
    questions: Callable[[Row], Iterable[Row]] = as_it_is
    """The questions of a line."""
    answer: Callable[[Task, Row], Mapping[str, Any]] | None = None
    """What is right, where that is no label."""

    @property
    def key(self) -> str:
        """The name with its benchmark, as both have an RTE."""
        return f"{self.benchmark}/{self.name}"

    def examples(self, split: str, folder: Path) -> Iterator[Example]:
        """The examples of a split.

        Args:
            split: one of `files`.
            folder: holds the benchmark's folders of tasks.

        Raises:
            DataError: a file that is missing or wrong, naming it with line and field.
        """
        path = folder / self.files[split]
        for row in self._rows(path):
            for question in self.questions(row):
                texts = {name: question.text(name).strip() for name in self.fields}
                answer = (self.answer or label_answer)(self, question)
                yield Example(
                    task=self.key,
                    source=question.source,
                    prompt=self.template.format_map(texts),
                    answer=answer,
                    unit=question.source if self.unit is None else str(question[self.unit]),
                )

    def _rows(self, path: Path) -> Iterator[Row]:
        if path.suffix == ".jsonl":
            return json_lines(path)
        return tab_separated(
            path,
            (*self.fields, self.label),
            columns=self.columns,
            has_broken_lines=self.has_broken_lines,
        )


def label_answer(task: Task, row: Row) -> dict[str, Any]:
    """The word of a question's label, out of those of all labels.

    Raises:
        DataError: a label that the task has not.
    """
    if task.label not in row.values:
        raise DataError(f"{row.source}: {task.label}: missing; {WITHHELD}")
    value = row[task.label]
    name = value if isinstance(value, str) else json.dumps(value)
    if name not in task.labels:
        reason = f"; {WITHHELD}" if name in ("-1", "") else ""
        raise DataError(
            f"{row.source}: {task.label}: {reprlib.repr(value)} is no label of {task.name}, which "
            f"has {', '.join(task.labels)}{reason}"
        )
    choices = list(dict.fromkeys(task.labels.values()))
    return {"choices": choices, "answer": task.labels[name]}


def read_tasks(
    tasks: Sequence[Task], split: str, folder: Path, *, limit: int | None = None
) -> list[Example]:
    """The examples of several tasks, one task behind the other.

    Args:
        tasks: those without this split (such as diagnostics in training) give none.
        split: train or dev.
        folder: holds GLUE/ and SuperGLUE/.
        limit: questions of each task at most; None takes all.

    Raises:
        DataError: see `Task.examples`, and where there is no example.
    """
    found = []
    for task in tasks:
        if split not in task.files:
            continue
        before = len(found)
        for example in task.examples(split, folder / task.benchmark):
            if len(found) - before == limit:
                break
            found.append(example)
        if len(found) == before:
            raise DataError(f"{folder / task.benchmark / task.files[split]}: no example in it")
    return found
