"""The tasks of SuperGLUE (arXiv 1905.00537), in the JSON Lines of super.gluebenchmark.com."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from typing import Any

from glue_tasks.data_files import WITHHELD, DataError, Row
from glue_tasks.inference import ENTAILS, INFERENCE, follows
from glue_tasks.task import Task

_TRUE_FALSE = {"true": "yes", "false": "no"}


def _jsonl(folder: str) -> dict[str, str]:
    return {"train": f"{folder}/train.jsonl", "dev": f"{folder}/val.jsonl"}


def _copa(row: Row) -> Iterator[Row]:
    """Ask for the cause or for the effect."""
    asked = row.text("question")
    questions = {"cause": "What was the cause?", "effect": "What happened as a result?"}
    if asked not in questions:
        raise DataError(f"{row.source}: question: {asked!r} is neither cause nor effect")
    yield Row(values={**row.values, "asked": questions[asked]}, source=row.source)


def _options(row: Row) -> Iterator[Row]:
    """Of a passage of MultiRC each option of each question; a question is judged as a whole."""
    passage = row.inner("passage")
    for question in passage.each("questions"):
        for option in question.each("answers"):
            values = {
                "passage": passage.text("text"),
                "question": question.text("question"),
                "option": option.text("text"),
                "unit": question.source,
            }
            if "label" in option.values:
                values["label"] = option["label"]
            yield Row(values=values, source=option.source)


def _queries(row: Row) -> Iterator[Row]:
    """The queries about a passage of ReCoRD, each with the names that stand in the passage."""
    passage = row.inner("passage")
    text = passage.text("text")
    names = []
    for entity in passage.each("entities"):
        start, end = entity["start"], entity["end"]  # the last character, not the one behind it
        if not (type(start) is type(end) is int and 0 <= start <= end < len(text)):
            raise DataError(
                f"{entity.source}: start, end: {start!r}, {end!r} are no characters of the text, "
                f"which has {len(text)}"
            )
        names.append(text[start : end + 1])
    for query in row.each("qas"):
        values = {
            **query.values,
            "passage": text.replace("@highlight\n", ""),
            "query": query.text("query").replace("@placeholder", "____"),
            "names": list(dict.fromkeys(names)),
        }
        yield Row(values=values, source=query.source)


def _name_answer(task: Task, row: Row) -> dict[str, Any]:
    """The names that fit, out of those of the passage."""
    if task.label not in row.values:
        raise DataError(f"{row.source}: {task.label}: missing; {WITHHELD}")
    answers = list(dict.fromkeys(answer.text("text") for answer in row.each(task.label)))
    if not answers:
        raise DataError(f"{row.source}: {task.label}: is empty; {WITHHELD}")
    return {"choices": row["names"], "answers": answers}


def _marked(row: Row) -> Iterator[Row]:
    """A text of WSC with its pronoun between asterisks, since it may stand there twice."""
    target = row.inner("target")
    words, place = row.text("text").split(" "), target["span2_index"]
    pronoun = target.text("span2_text")
    if type(place) is not int or not 0 <= place < len(words):
        raise DataError(
            f"{target.source}: span2_index: {reprlib.repr(place)} is no word of the text, which "
            f"has {len(words)}"
        )
    words[place] = f"*{words[place]}*"
    values = {
        **row.values,
        "text": " ".join(words),
        "noun": target.text("span1_text"),
        "pronoun": pronoun,
    }
    yield Row(values=values, source=row.source)


SUPERGLUE = (
    Task(
        name="BoolQ",
        benchmark="SuperGLUE",
        files=_jsonl("BoolQ"),
        template="{passage}\n{question}? Say yes or no.",
        fields=("passage", "question"),
        labels=_TRUE_FALSE,
        metrics=("accuracy",),
    ),
    Task(
        name="CB",
        benchmark="SuperGLUE",
        files=_jsonl("CB"),
        template=follows("premise", "hypothesis", maybe=True),
        fields=("premise", "hypothesis"),
        labels=INFERENCE,
        metrics=("macro_f1", "accuracy"),
    ),
    Task(
        name="COPA",
        benchmark="SuperGLUE",
        files=_jsonl("COPA"),
        template="{premise} {asked}\n1: {choice1}\n2: {choice2}\nSay 1 or 2.",
        fields=("premise", "asked", "choice1", "choice2"),
        labels={"0": "1", "1": "2"},
        metrics=("accuracy",),
        questions=_copa,
    ),
    Task(
        name="MultiRC",
        benchmark="SuperGLUE",
        files=_jsonl("MultiRC"),
        template="{passage}\nQuestion: {question}\nAnswer: {option}\nIs the answer right? "
        "Say yes or no.",
        fields=("passage", "question", "option"),
        labels={"1": "yes", "0": "no"},
        metrics=("f1", "exact_match_of_units"),
        unit="unit",
        questions=_options,
    ),
    Task(
        name="ReCoRD",
        benchmark="SuperGLUE",
        files=_jsonl("ReCoRD"),
        template="{passage}\nWhich name of the text is missing in the next sentence?\n{query}\n"
        "Say the name.",
        fields=("passage", "query"),
        label="answers",
        labels={},
        metrics=("name_f1", "name_exact_match"),
        questions=_queries,
        answer=_name_answer,
    ),
    Task(
        name="RTE",
        benchmark="SuperGLUE",
        files=_jsonl("RTE"),
        template=follows("premise", "hypothesis"),
        fields=("premise", "hypothesis"),
        labels=ENTAILS,
        metrics=("accuracy",),
    ),
    Task(
        name="WiC",
        benchmark="SuperGLUE",
        files=_jsonl("WiC"),
        template="{sentence1}\n{sentence2}\nDoes {word} mean the same in both sentences? "
        "Say yes or no.",
        fields=("sentence1", "sentence2", "word"),
        labels=_TRUE_FALSE,
        metrics=("accuracy",),
    ),
    Task(
        name="WSC",
        benchmark="SuperGLUE",
        files=_jsonl("WSC"),
        template="{text}\nIs {noun} meant by *{pronoun}*? Say yes or no.",
        fields=("text", "noun", "pronoun"),
        labels=_TRUE_FALSE,
        metrics=("accuracy",),
        questions=_marked,
    ),
    Task(
        name="AX-b",
        benchmark="SuperGLUE",
        files={"dev": "AX-b/AX-b.jsonl"},
        template=follows("sentence1", "sentence2"),
        fields=("sentence1", "sentence2"),
        labels=ENTAILS,
        metrics=("matthews",),
        is_diagnostic=True,
    ),
    Task(
        name="AX-g",
        benchmark="SuperGLUE",
        files={"dev": "AX-g/AX-g.jsonl"},
        template=follows("premise", "hypothesis"),
        fields=("premise", "hypothesis"),
        labels=ENTAILS,
        metrics=("unit_parity", "accuracy"),
        unit="pair_id",
        is_diagnostic=True,
    ),
)
"""In the order of the paper."""
