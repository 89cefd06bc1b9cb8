"""Write the sample that ships with the GSM8K example, in this data set's format.

    python examples/make_samples.py

It is made up from a few sentence patterns: enough to see the example run, and nothing that says how
good a model is. For the real thing put the data set's own train.jsonl and test.jsonl into a folder,
and name it with --data.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn")
THINGS = ("apples", "books", "coins", "pens", "stamps")


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


def write(folder: Path, records: Iterable[dict[str, Any]], *, train: int, test: int) -> None:
    """Draw the two files' records; no record is in both."""
    drawn = random.Random(0).sample(list(records), train + test)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", drawn[:train]), ("test", drawn[train:])):
        lines = "".join(json.dumps(record) + "\n" for record in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).parent / "gsm8k" / "sample", sums(), train=160, test=40)
