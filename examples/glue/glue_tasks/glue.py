"""The tasks of GLUE (arXiv 1804.07461), in the tab-separated files of gluebenchmark.com."""

from __future__ import annotations

import math
import reprlib
from typing import Any

from glue_tasks.data_files import DataError, Row
from glue_tasks.inference import ENTAILS, INFERENCE, follows
from glue_tasks.task import Task

_YES_NO = {"1": "yes", "0": "no"}
_LARGEST_SCORE = 5.0


def _tsv(folder: str) -> dict[str, str]:
    return {"train": f"{folder}/train.tsv", "dev": f"{folder}/dev.tsv"}


def _score(task: Task, row: Row) -> dict[str, Any]:
    """STS-B's score, from 0 to 5."""
    value = row[task.label]
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= _LARGEST_SCORE:
        raise DataError(
            f"{row.source}: {task.label}: {reprlib.repr(value)} is no number from 0 to "
            f"{_LARGEST_SCORE:g}"
        )
    return {"number": number, "largest": _LARGEST_SCORE}


def _mnli(name: str, files: dict[str, str]) -> Task:
    return Task(
        name=name,
        benchmark="GLUE",
        files=files,
        template=follows("sentence1", "sentence2", maybe=True),
        fields=("sentence1", "sentence2"),
        label="gold_label",
        labels=INFERENCE,
        metrics=("accuracy",),
        part_of="MNLI",
    )


GLUE = (
    Task(
        name="CoLA",
        benchmark="GLUE",
        files=_tsv("CoLA"),
        columns=("source", "label", "mark", "sentence"),
        template="{sentence}\nIs this sentence correct English? Say yes or no.",
        fields=("sentence",),
        labels=_YES_NO,
        metrics=("matthews",),
    ),
    Task(
        name="SST-2",
        benchmark="GLUE",
        files=_tsv("SST-2"),
        template="{sentence}\nIs this review positive or negative?",
        fields=("sentence",),
        labels={"1": "positive", "0": "negative"},
        positive="positive",
        metrics=("accuracy",),
    ),
    Task(
        name="MRPC",
        benchmark="GLUE",
        files=_tsv("MRPC"),
        template="{#1 String}\n{#2 String}\nDo both sentences say the same? Say yes or no.",
        fields=("#1 String", "#2 String"),
        label="Quality",
        labels=_YES_NO,
        metrics=("f1", "accuracy"),
    ),
    Task(
        name="STS-B",
        benchmark="GLUE",
        files=_tsv("STS-B"),
        template="{sentence1}\n{sentence2}\nHow similar are both sentences, from 0 (not at all) to "
        "5 (they say the same)? Say a number.",
        fields=("sentence1", "sentence2"),
        label="score",
        labels={},
        answer=_score,
        metrics=("pearson", "spearman"),
    ),
    Task(
        name="QQP",
        benchmark="GLUE",
        files=_tsv("QQP"),
        template="{question1}\n{question2}\nDo both questions ask the same? Say yes or no.",
        fields=("question1", "question2"),
        label="is_duplicate",
        labels=_YES_NO,
        metrics=("f1", "accuracy"),
        has_broken_lines=True,
    ),
    _mnli("MNLI-m", {"train": "MNLI/train.tsv", "dev": "MNLI/dev_matched.tsv"}),
    _mnli("MNLI-mm", {"dev": "MNLI/dev_mismatched.tsv"}),
    Task(
        name="QNLI",
        benchmark="GLUE",
        files=_tsv("QNLI"),
        template="{question}\nDoes the next sentence answer the question?\n{sentence}\n"
        "Say yes or no.",
        fields=("question", "sentence"),
        labels=ENTAILS,
        metrics=("accuracy",),
    ),
    Task(
        name="RTE",
        benchmark="GLUE",
        files=_tsv("RTE"),
        template=follows("sentence1", "sentence2"),
        fields=("sentence1", "sentence2"),
        labels=ENTAILS,
        metrics=("accuracy",),
    ),
    Task(
        name="WNLI",
        benchmark="GLUE",
        files=_tsv("WNLI"),
        template=follows("sentence1", "sentence2"),
        fields=("sentence1", "sentence2"),
        labels=_YES_NO,
        metrics=("accuracy",),
    ),
    Task(
        name="AX",
        benchmark="GLUE",
        # With labels; the diagnostic.tsv of the leaderboard has none.
        files={"dev": "diagnostic/diagnostic-full.tsv"},
        template=follows("Premise", "Hypothesis", maybe=True),
        fields=("Premise", "Hypothesis"),
        label="Label",
        labels=INFERENCE,
        metrics=("matthews",),
        is_diagnostic=True,
    ),
)
"""In the order of the leaderboard."""
