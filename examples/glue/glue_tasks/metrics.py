"""The metrics of GLUE and SuperGLUE, as percentages (correlations times 100).

A response without an answer is wrong: it counts as a class of its own, which no example has. Where
a score is asked for, it counts as the middle of the range. A correlation with answers that are all
the same is undefined, and counts as 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from glue_tasks.answers import exact_match, token_f1

_NO_ANSWER = "(none)"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One example and what was answered."""

    answer: Mapping[str, Any]
    """Of the example (see `Example.answer`)."""
    found: str | float | None
    """What `answers.predicted` found in the response."""
    unit: str
    """Of the example."""


def _classes(judged: Sequence[Judged]) -> tuple[list[str], list[str]]:
    """Words that are right, and words that were answered."""
    right = [j.answer["answer"] for j in judged]
    return right, [_NO_ANSWER if j.found is None else str(j.found) for j in judged]


def accuracy(judged: Sequence[Judged], positive: str) -> float:
    """Part of the answers that are right."""
    return 100 * float(accuracy_score(*_classes(judged)))


def f1(judged: Sequence[Judged], positive: str) -> float:
    """F1 of one class, over all examples (F1a of MultiRC)."""
    right, found = _classes(judged)
    score = f1_score(right, found, labels=[positive], average="macro", zero_division=0)
    return 100 * float(score)


def macro_f1(judged: Sequence[Judged], positive: str) -> float:
    """Mean F1 of the classes that are right or answered somewhere."""
    right, found = _classes(judged)
    labels = sorted({*right, *found} - {_NO_ANSWER})
    return 100 * float(f1_score(right, found, labels=labels, average="macro", zero_division=0))


def matthews(judged: Sequence[Judged], positive: str) -> float:
    """Matthews' correlation; with more than two classes its generalisation R_K."""
    return 100 * float(matthews_corrcoef(*_classes(judged)))


def pearson(judged: Sequence[Judged], positive: str) -> float:
    """Correlation of scores."""
    return _correlation(stats.pearsonr, judged)


def spearman(judged: Sequence[Judged], positive: str) -> float:
    """Correlation of the ranks of scores."""
    return _correlation(stats.spearmanr, judged)


def _correlation(function: Callable[..., Any], judged: Sequence[Judged]) -> float:
    right = [j.answer["number"] for j in judged]
    found = [j.answer["largest"] / 2 if j.found is None else float(j.found) for j in judged]
    if np.ptp(right) == 0 or np.ptp(found) == 0:
        return 0.0
    return 100 * float(function(right, found).statistic)


def exact_match_of_units(judged: Sequence[Judged], positive: str) -> float:
    """Part of the units all of whose answers are right (EM of MultiRC)."""
    return _part_of_units(judged, lambda unit: all(j.found == j.answer["answer"] for j in unit))


def unit_parity(judged: Sequence[Judged], positive: str) -> float:
    """Part of the units whose answers are all the same (gender parity of AX-g)."""
    return _part_of_units(judged, lambda unit: len({j.found for j in unit}) == 1)


def _part_of_units(judged: Sequence[Judged], holds: Callable[[list[Judged]], bool]) -> float:
    units: dict[str, list[Judged]] = defaultdict(list)
    for one in judged:
        units[one.unit].append(one)
    return 100 * sum(map(holds, units.values())) / len(units)


def name_exact_match(judged: Sequence[Judged], positive: str) -> float:
    """Part of the names that are one of the answers (EM of ReCoRD)."""
    return 100 * float(np.mean([exact_match(str(j.found), j.answer["answers"]) for j in judged]))


def name_f1(judged: Sequence[Judged], positive: str) -> float:
    """Mean F1 of the words of names (F1 of ReCoRD)."""
    return 100 * float(np.mean([token_f1(str(j.found), j.answer["answers"]) for j in judged]))


METRICS: dict[str, Callable[[Sequence[Judged], str], float]] = {
    function.__name__: function
    for function in (
        accuracy,
        f1,
        macro_f1,
        matthews,
        pearson,
        spearman,
        exact_match_of_units,
        unit_parity,
        name_exact_match,
        name_f1,
    )
}
"""Each takes the examples of a task and the word of its positive class."""
