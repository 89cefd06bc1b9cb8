"""GLUE and SuperGLUE: files, prompts, labels, metrics and averages of every task."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "glue"
sys.path.insert(0, str(EXAMPLE))

from glue_tasks import metrics  # noqa: E402
from glue_tasks.answers import predicted, reward  # noqa: E402
from glue_tasks.data_files import DataError  # noqa: E402
from glue_tasks.metrics import METRICS, Judged  # noqa: E402
from glue_tasks.scores import (  # noqa: E402
    TASKS,
    TaskScore,
    average,
    chosen_tasks,
    score_tasks,
)
from glue_tasks.task import Task, read_tasks  # noqa: E402

SAMPLE = EXAMPLE / "sample"
ENTAILS = "\nDoes it follow that the next sentence is true?\n"
TRAIN = f"The train to the coast left ten minutes late.{ENTAILS}The train was not on time.\n"

FIRST = {
    "GLUE/CoLA": (
        "The lamp that I bought flickers.\nIs this sentence correct English? Say yes or no.",
        "yes",
    ),
    "GLUE/SST-2": (
        "i laughed from the first scene to the last\nIs this review positive or negative?",
        "positive",
    ),
    "GLUE/MRPC": (
        "The airline added a flight to the island.\nA flight to the island was added by the "
        "airline.\nDo both sentences say the same? Say yes or no.",
        "yes",
    ),
    "GLUE/STS-B": (
        "The airline added a flight to the island.\nA flight to the island was added by the "
        "airline.\nHow similar are both sentences, from 0 (not at all) to 5 (they say the same)? "
        "Say a number.",
        5.0,
    ),
    "GLUE/QQP": (
        "How do I fix a flat tyre?\nWhat is the way to repair a flat tyre?\nDo both questions ask "
        "the same? Say yes or no.",
        "yes",
    ),
    "GLUE/MNLI-m": (f"{TRAIN}Say yes, no or maybe.", "yes"),
    "GLUE/MNLI-mm": (
        f"A young carpenter built the table from oak.{ENTAILS}The table is made of wood.\n"
        "Say yes, no or maybe.",
        "yes",
    ),
    "GLUE/QNLI": (
        "How many stairs lead to the tower?\nDoes the next sentence answer the question?\nTwo "
        "hundred and six stairs lead to the tower.\nSay yes or no.",
        "yes",
    ),
    "GLUE/RTE": (f"{TRAIN}Say yes or no.", "yes"),
    "GLUE/WNLI": (
        f"The vase fell on the stone because it was loose.{ENTAILS}The vase was loose.\n"
        "Say yes or no.",
        "no",
    ),
    "GLUE/AX": (f"{TRAIN}Say yes, no or maybe.", "yes"),
    "SuperGLUE/BoolQ": (
        "The village of Lund has two inns and one church. The church burned in 1702 and was built "
        "again of stone. The inns are newer.\nwas the church of lund built again? Say yes or no.",
        "yes",
    ),
    "SuperGLUE/CB": (
        f"The cook burned the soup and made a salad instead.{ENTAILS}The cook made a salad.\n"
        "Say yes, no or maybe.",
        "yes",
    ),
    "SuperGLUE/COPA": (
        "The milk tasted sour. What was the cause?\n1: It had stood in the sun.\n2: The cup was "
        "blue.\nSay 1 or 2.",
        "1",
    ),
    "SuperGLUE/MultiRC": (
        "Oskar repairs clocks in a small shop. He learned the trade from his aunt. Every morning "
        "he winds the clock of the town hall, and once a year he oils its wheels.\nQuestion: What "
        "does Oskar do?\nAnswer: He winds the clock of the town hall.\nIs the answer right? Say "
        "yes or no.",
        "yes",
    ),
    "SuperGLUE/ReCoRD": (
        "The zoo of Merrin has named its young bear Tuku. The keeper Ines Moll feeds it with a "
        "bottle since its mother fell ill.\nBear in Merrin is fed by hand\nWhich name of the text "
        "is missing in the next sentence?\nEvery three hours ____ warms the milk for the young "
        "bear.\nSay the name.",
        ["Ines Moll", "Moll"],
    ),
    "SuperGLUE/RTE": (
        f"A young carpenter built the table from oak.{ENTAILS}The table is made of wood.\n"
        "Say yes or no.",
        "yes",
    ),
    "SuperGLUE/WiC": (
        "In spring the snow melts.\nThe spring of the watch is broken.\nDoes spring mean the same "
        "in both sentences? Say yes or no.",
        "no",
    ),
    "SuperGLUE/WSC": (
        "The vase fell on the stone because *it* was loose.\nIs The vase meant by *it*? Say yes or "
        "no.",
        "no",
    ),
    "SuperGLUE/AX-b": (
        "The museum lent a painting to a school for one year."
        f"{ENTAILS}A school received a painting.\nSay yes or no.",
        "yes",
    ),
    "SuperGLUE/AX-g": (
        f"The mechanic greeted the customer because she had waited long.{ENTAILS}The customer had "
        "waited long.\nSay yes or no.",
        "yes",
    ),
}
"""Prompt and answer of the first example that each task is validated on."""


def task(key: str) -> Task:
    return next(task for task in TASKS if task.key == key)


@pytest.mark.parametrize("key", [task.key for task in TASKS])
def test_a_task_reads_its_official_format(key: str) -> None:
    examples = read_tasks([task(key)], "dev", SAMPLE)
    first = examples[0]
    answers = [first.answer.get(name) for name in ("answer", "number", "answers")]
    assert (first.prompt, next(a for a in answers if a is not None)) == FIRST[key]
    assert len(examples) >= 6
    assert {example.task for example in examples} == {key}
    # Every class is an answer somewhere, and a right answer is worth 1, a wrong one less.
    choices = first.answer.get("choices", [])
    if "answer" in first.answer:
        assert {example.answer["answer"] for example in examples} == set(choices)
    for example in examples:
        right = example.answer.get("answer", example.answer.get("number"))
        right = example.answer["answers"][0] if right is None else right
        assert reward(example.prompt, f"It is {right}.", example.answer) == 1
        assert reward(example.prompt, "Hm.", example.answer) == 0


def test_every_task_with_a_train_file_is_trained_on() -> None:
    train = {example.task for example in read_tasks(TASKS, "train", SAMPLE)}
    assert {task.key for task in TASKS} - train == {
        *("GLUE/MNLI-mm", "GLUE/AX", "SuperGLUE/AX-b", "SuperGLUE/AX-g")
    }


def test_parts_of_a_passage_are_examples_of_their_own() -> None:
    rc = read_tasks([task("SuperGLUE/MultiRC")], "dev", SAMPLE)
    sources = [example.source.split("val.jsonl:")[1] for example in rc]
    assert sources[2:4] == [
        "1: passage: questions: 0: answers: 2",
        "2: passage: questions: 0: answers: 0",
    ]
    assert [rc[0].unit == example.unit for example in rc] == [True] * 3 + [False] * 4
    gender = read_tasks([task("SuperGLUE/AX-g")], "dev", SAMPLE)
    assert [example.unit for example in gender] == ["0", "0", "1", "1", "2", "2"]


def test_tasks_are_chosen_by_name() -> None:
    assert chosen_tasks(["all"]) == list(TASKS)
    assert [t.key for t in chosen_tasks(["cb", "mnli", "GLUE/RTE"])] == [
        *("GLUE/MNLI-m", "GLUE/MNLI-mm", "GLUE/RTE", "SuperGLUE/CB")
    ]
    assert len(chosen_tasks(["GLUE"])) == 11 and len(chosen_tasks(["superglue"])) == 10
    with pytest.raises(ValueError, match="task RTE: choose of GLUE/RTE, SuperGLUE/RTE"):
        chosen_tasks(["RTE"])
    with pytest.raises(ValueError, match="task SST: there is none; choose of GLUE/CoLA"):
        chosen_tasks(["SST"])


def write(folder: Path, key: str, text: str | bytes) -> Path:
    path = folder / task(key).benchmark / task(key).files["dev"]
    path.parent.mkdir(parents=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


RTE = "index\tsentence1\tsentence2\tlabel\n"
PASSAGE = {"text": "Ada met Ben.", "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 40}]}
WRONG = {
    "a column is missing": (
        "GLUE/RTE",
        "index\tsentence1\tlabel\n0\ta\tentailment\n",
        ":1: sentence2: there is no such column, the file has index, sentence1, label",
    ),
    "the test split's file": (
        "GLUE/RTE",
        "index\tsentence1\tsentence2\n0\ta\tb\n",
        ":1: label: there is no such column, .* labels of test splits are withheld",
    ),
    "a line is cut": (
        "GLUE/RTE",
        RTE + "0\ta\tb\tentailment\n1\ta\tb\n",
        ":3: label: is empty or missing; the line has 3 of 4 columns",
    ),
    "another label": (
        "GLUE/RTE",
        RTE + "0\ta\tb\tneutral\n",
        ":2: label: 'neutral' is no label of RTE, which has entailment, not_entailment$",
    ),
    "a label of -1": (
        "GLUE/WNLI",
        RTE + "0\ta\tb\t-1\n",
        ":2: label: '-1' is no label of WNLI, which has 1, 0; labels of test splits are withheld",
    ),
    "CoLA's test file, which has a header": (
        "GLUE/CoLA",
        "index\tsentence\n0\tA dog.\n",
        ":1: sentence: is empty or missing; the line has 2 of 4 columns",
    ),
    "no example": ("GLUE/RTE", RTE, "dev.tsv: no example in it"),
    "an empty file": ("GLUE/RTE", "", ":1: sentence1: there is no such column"),
    "a score out of range": (
        "GLUE/STS-B",
        "sentence1\tsentence2\tscore\na\tb\t5.5\n",
        ":2: score: '5.5' is no number from 0 to 5",
    ),
    "not UTF-8": ("GLUE/RTE", (RTE + "0\t").encode() + b"\xff\n", ":[12]: no UTF-8 text"),
    "JSON's label of -1": (
        "SuperGLUE/COPA",
        '{"premise": "a", "choice1": "b", "choice2": "c", "question": "cause", "label": -1}\n',
        ":1: label: -1 is no label of COPA, .* withheld",
    ),
    "a test split without labels": (
        "SuperGLUE/BoolQ",
        '\n{"question": "a", "passage": "b"}\n',
        ":2: label: missing; labels of test splits are withheld",
    ),
    "a field is missing": (
        "SuperGLUE/BoolQ",
        '{"question": "a", "label": true}\n',
        ":1: passage: missing; the line has question, label",
    ),
    "a text is a number": (
        "SuperGLUE/BoolQ",
        '{"question": 3, "passage": "b", "label": true}\n',
        ":1: question: 3 is not text",
    ),
    "a label of another type": (
        "SuperGLUE/BoolQ",
        '{"question": "a", "passage": "b", "label": 1}\n',
        ":1: label: 1 is no label of BoolQ, which has true, false",
    ),
    "neither cause nor effect": (
        "SuperGLUE/COPA",
        '{"premise": "a", "choice1": "b", "choice2": "c", "question": "why", "label": 0}\n',
        ":1: question: 'why' is neither cause nor effect",
    ),
    "no JSON": ("SuperGLUE/BoolQ", '{"question":\n', ":1: no JSON: "),
    "no object": ("SuperGLUE/BoolQ", "[1]\n", r":1: \[1\] is not an object"),
    "an inner field is missing": (
        "SuperGLUE/MultiRC",
        '{"passage": {"text": "a"}}\n',
        ":1: passage: questions: missing; the line has text",
    ),
    "no list": (
        "SuperGLUE/MultiRC",
        '{"passage": {"text": "a", "questions": 3}}\n',
        ":1: passage: questions: 3 is not a list",
    ),
    "a name outside of its passage": (
        "SuperGLUE/ReCoRD",
        json.dumps({"passage": PASSAGE, "qas": []}) + "\n",
        ":1: passage: entities: 1: start, end: 8, 40 are no characters of the text, which has 12",
    ),
    "queries without answers": (
        "SuperGLUE/ReCoRD",
        json.dumps({"passage": {**PASSAGE, "entities": []}, "qas": [{"query": "a"}]}) + "\n",
        ":1: qas: 0: answers: missing; labels of test splits are withheld",
    ),
    "a pronoun outside of its text": (
        "SuperGLUE/WSC",
        '{"text": "Ada ran.", "target": {"span1_text": "Ada", "span2_text": "she", '
        '"span2_index": 2}, "label": true}\n',
        ":1: target: span2_index: 2 is no word of the text, which has 2",
    ),
    "pairs without a name": (
        "SuperGLUE/AX-g",
        '{"premise": "a", "hypothesis": "b", "label": "entailment"}\n',
        ":1: pair_id: missing",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_by_name_and_line(tmp_path: Path, case: str) -> None:
    key, text, message = WRONG[case]
    path = write(tmp_path, key, text)
    with pytest.raises(DataError, match=message) as caught:
        read_tasks([task(key)], "dev", tmp_path)
    assert str(caught.value).startswith(str(path))


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"GLUE/QNLI/dev.tsv: there is no such file"):
        read_tasks([task("GLUE/QNLI")], "dev", tmp_path)


def test_quotes_and_other_line_ends_are_characters_of_a_text(tmp_path: Path) -> None:
    text = f'\ufeff{RTE}0\t"A dog\u2028ran.\tIt said "no.\tentailment\r\n'
    write(tmp_path, "GLUE/RTE", text)
    [example] = read_tasks([task("GLUE/RTE")], "dev", tmp_path)
    assert example.prompt == f'"A dog\u2028ran.{ENTAILS}It said "no.\nSay yes or no.'


def test_the_wrong_lines_of_the_official_qqp_are_passed_over_and_many_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = "question1\tquestion2\tis_duplicate\n"
    whole, broken = "a\tb\t1\n", "a\tb\n"
    path = write(tmp_path, "GLUE/QQP", head + 1500 * whole + broken)
    assert len(read_tasks([task("GLUE/QQP")], "dev", tmp_path)) == 1500
    assert f"passed over 1 of 1501 lines; {path}:1502: is_duplicate: is empty" in caplog.text
    path.write_text(head + 500 * whole + broken)
    with pytest.raises(DataError, match=r":502: .* 2 of 3 columns .* 1 such lines of 501"):
        read_tasks([task("GLUE/QQP")], "dev", tmp_path)


def test_an_answer_is_found_in_a_response() -> None:
    classes = {"choices": ["yes", "maybe", "no"], "answer": "no"}
    assert predicted("Yes? No.", classes) == "no"
    assert predicted("I know nothing.", classes) is None
    score = {"number": 4.0, "largest": 5.0}
    assert [predicted(text, score) for text in ("3.5", "-2", "about 12", "similar")] == [
        *(3.5, 0, 5, None)
    ]
    assert reward("", "3", score) == 0.8 and reward("", "similar", score) == 0
    name = {"choices": ["Ada", "Lena Stahl"], "answers": ["Lena Stahl", "Stahl"]}
    assert predicted("Not Ada but lena stahl.", name) == "Lena Stahl"
    assert predicted(" The Stahl! ", name) == "The Stahl!"
    assert reward("", "The Stahl!", name) == 1 and reward("", "Ada", name) == 0


def classes(right: str, found: str, *, units: str = "") -> list[Judged]:
    """Of one letter each: y, n, m, and - for no answer."""
    words = {"y": "yes", "n": "no", "m": "maybe", "-": None}
    return [
        Judged(answer={"answer": words[r]}, found=words[f], unit=u)
        for r, f, u in zip(right, found, units or "u" * len(right), strict=True)
    ]


def scores(right: list[float], found: list[float | None]) -> list[Judged]:
    return [
        Judged(answer={"number": r, "largest": 5.0}, found=f, unit="u")
        for r, f in zip(right, found, strict=True)
    ]


def names(*found: str) -> list[Judged]:
    answer = {"choices": [], "answers": ["Lena Stahl", "Stahl"]}
    return [Judged(answer=answer, found=f, unit="u") for f in found]


BY_HAND = [
    (metrics.accuracy, classes("yynn", "yn-n"), 50),
    # 1 true positive, 1 false positive, 2 that were missed: 2 / (2 + 1 + 2).
    (metrics.f1, classes("yyynn", "yn-yn"), 40),
    (metrics.f1, classes("nn", "n-"), 0),
    # yes 2/3 and no 2/3 (one of each is taken for the other), maybe 1.
    (metrics.macro_f1, classes("yynm", "ynnm"), 100 * 7 / 9),
    # A class that is nowhere has no F1; one without answer has a recall of a half.
    (metrics.macro_f1, classes("yynn", "yyn-"), 100 * (1 + 2 / 3) / 2),
    # 2 true positives, 1 true negative, 1 false positive, 1 false negative:
    # (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2).
    (metrics.matthews, classes("yyynn", "yynyn"), 100 / 6),
    (metrics.matthews, classes("yynn", "nnyy"), -100),
    (metrics.matthews, classes("yynn", "----"), 0),
    # Of deviations (-1.5, -0.5, 0.5, 1.5) and (-2, -1, 0, 3): 8 / sqrt(5 * 14).
    (metrics.pearson, scores([0, 1, 2, 3], [0, 1, 2, 5]), 100 * 8 / 70**0.5),
    # No answer is 2.5, which is on the line.
    (metrics.pearson, scores([0, 2.5, 5], [0, None, 5]), 100),
    (metrics.pearson, scores([0, 1, 2], [3, 3, 3]), 0),
    # Two ranks differ by 1: 1 - 6 * 2 / (4 * 15).
    (metrics.spearman, scores([1, 2, 3, 4], [0, 2, 1, 5]), 80),
    (metrics.exact_match_of_units, classes("ynyny", "ynnn-", units="aabbc"), 100 / 3),
    (metrics.unit_parity, classes("ynyy", "yyyn", units="aabb"), 50),
    (metrics.name_exact_match, names("stahl", "the Lena Stahl!", "Lena", "Ada"), 50),
    # Lena: 2 * 1 / (1 + 2) with Lena Stahl; Ben Stahl: 2 * 1 / (2 + 1) with Stahl.
    (metrics.name_f1, names("Stahl", "Lena", "Ben Stahl", "Ada"), 100 * (1 + 2 / 3 + 2 / 3) / 4),
]


@pytest.mark.parametrize(("metric", "judged", "expected"), BY_HAND)
def test_a_metric_is_what_is_computed_by_hand(metric, judged, expected) -> None:
    assert metric(judged, "yes") == pytest.approx(expected)


def test_every_metric_is_computed_by_hand_and_used() -> None:
    used = {name for task in TASKS for name in task.metrics}
    assert {metric.__name__ for metric, _, _ in BY_HAND} == set(METRICS) == used


def test_each_task_has_its_official_metrics() -> None:
    own = {task.key: task.metrics for task in TASKS if task.metrics != ("accuracy",)}
    assert own == {
        "GLUE/CoLA": ("matthews",),
        "GLUE/MRPC": ("f1", "accuracy"),
        "GLUE/STS-B": ("pearson", "spearman"),
        "GLUE/QQP": ("f1", "accuracy"),
        "GLUE/AX": ("matthews",),
        "SuperGLUE/CB": ("macro_f1", "accuracy"),
        "SuperGLUE/MultiRC": ("f1", "exact_match_of_units"),
        "SuperGLUE/ReCoRD": ("name_f1", "name_exact_match"),
        "SuperGLUE/AX-b": ("matthews",),
        "SuperGLUE/AX-g": ("unit_parity", "accuracy"),
    }


def published(benchmark: str, rows: dict[str, tuple[float, ...]]) -> list[TaskScore]:
    return [
        TaskScore(
            task=(found := task(f"{benchmark}/{name}")),
            metrics=dict(zip(found.metrics, values, strict=True)),
            examples=1,
            answered=1,
        )
        for name, values in rows.items()
    ]


BERT_GLUE = {
    "CoLA": (60.5,),
    "SST-2": (94.9,),
    "MRPC": (89.3, 85.4),
    "STS-B": (87.6, 86.5),
    "QQP": (72.1, 89.3),
    "MNLI-m": (86.7,),
    "MNLI-mm": (85.9,),
    "QNLI": (92.7,),
    "RTE": (70.1,),
    "WNLI": (65.1,),
    "AX": (39.6,),
}
BERT_SUPERGLUE = {
    "BoolQ": (77.4,),
    "CB": (75.7, 83.6),
    "COPA": (70.6,),
    "MultiRC": (70.0, 24.1),
    "ReCoRD": (72.0, 71.3),
    "RTE": (71.7,),
    "WiC": (69.6,),
    "WSC": (64.4,),
    "AX-b": (23.0,),
    "AX-g": (97.8, 51.7),
}


def test_the_averages_are_those_of_the_leaderboards() -> None:
    """BERT-large's rows, whose averages the leaderboards give as 80.5 and 69.0."""
    glue = average("GLUE", published("GLUE", BERT_GLUE))
    # 60.5 + 94.9 + 87.35 + 87.05 + 80.7 + 86.3 + 92.7 + 70.1 + 65.1 over 9: MNLI's two count once.
    assert glue.score == pytest.approx(724.7 / 9)
    assert len(glue.tasks) == 9 and glue.missing == ()
    superglue = average("SuperGLUE", published("SuperGLUE", BERT_SUPERGLUE))
    # 77.4 + 79.65 + 70.6 + 47.05 + 71.65 + 71.7 + 69.6 + 64.4 over 8.
    assert superglue.score == pytest.approx(552.05 / 8)
    assert len(superglue.tasks) == 8 and superglue.missing == ()


def test_an_average_of_some_tasks_says_which_are_missing() -> None:
    some = average("GLUE", published("GLUE", {"CoLA": (50,), "MNLI-mm": (70,), "AX": (0,)}))
    assert some.score == 60 and some.tasks == ("CoLA", "MNLI")
    assert some.missing == ("SST-2", "MRPC", "STS-B", "QQP", "MNLI-m", "QNLI", "RTE", "WNLI")
    assert average("SuperGLUE", published("GLUE", {"CoLA": (50,)})) is None


def test_responses_to_all_tasks_are_scored() -> None:
    examples = read_tasks(TASKS, "dev", SAMPLE)
    found = score_tasks(examples, ["yes"] * len(examples))
    assert [score.task for score in found] == list(TASKS)
    by_key = {score.task.key: score for score in found}
    assert by_key["GLUE/SST-2"].answered == 0 and by_key["GLUE/CoLA"].answered == 6
    # Of 6 pairs 3 are the same: F1 of yes is 2/3, accuracy a half.
    assert by_key["GLUE/MRPC"].score == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)
    # 0, 0, 58.3, 0, 58.3, 33.3 twice, 50, 50, 50.
    assert average("GLUE", found).score == pytest.approx((2 * 175 / 3 + 100 / 3 + 150) / 9)
