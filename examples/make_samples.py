"""Write the samples that ship with the GSM8K and SuperGLUE examples, in these data sets' formats.

    python examples/make_samples.py

They are made up from a few sentence patterns: enough to see the examples run, and nothing that says
how good a model is. For the real thing put the data sets' own train.jsonl and test.jsonl into a
folder, and name it with --data.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn")
THINGS = ("apples", "books", "coins", "pens", "stamps")
COLOURS = ("red", "blue", "green")
ANIMALS = ("dog", "cat", "horse", "bird")
PLACES = ("in the garden", "at the gate", "by the river")


def sums() -> Iterator[dict[str, Any]]:
    """GSM8K's fields: a question, and a solution that ends in #### and the number."""
    for name in NAMES:
        for thing in THINGS:
            for has in range(2, 8):
                for other in range(1, has):
                    yield {
                        "question": f"{name} has {has} {thing} and gets {other} more. How many "
                        f"{thing} does {name} have?",
                        "answer": f"{has} + {other} = {has + other}\n#### {has + other}",
                    }
                    yield {
                        "question": f"{name} has {has} {thing} and gives away {other}. How many "
                        f"{thing} does {name} have?",
                        "answer": f"{has} - {other} = {has - other}\n#### {has - other}",
                    }


def entailments() -> Iterator[dict[str, Any]]:
    """RTE's fields: what is said, what may follow from it, and whether it does."""
    for colour in COLOURS:
        for animal in ANIMALS:
            for place in PLACES:
                said = f"The {colour} {animal} sleeps {place}."
                for hypothesis, follows in (
                    (f"The {animal} sleeps.", True),
                    (f"The {animal} is {colour}.", True),
                    (f"The {animal} runs.", False),
                    *((f"The {animal} is {c}.", False) for c in COLOURS if c != colour),
                    *((f"The {animal} sleeps {p}.", p == place) for p in PLACES),
                ):
                    yield {
                        "premise": said,
                        "hypothesis": hypothesis,
                        "label": "entailment" if follows else "not_entailment",
                    }


def write(folder: Path, records: Iterable[dict[str, Any]], *, train: int, test: int) -> None:
    """Draw the two files' records; no record is in both."""
    drawn = random.Random(0).sample(list(records), train + test)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", drawn[:train]), ("test", drawn[train:])):
        lines = "".join(json.dumps(record) + "\n" for record in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    here = Path(__file__).parent
    write(here / "gsm8k" / "sample", sums(), train=160, test=40)
    write(here / "superglue" / "sample", entailments(), train=160, test=40)
