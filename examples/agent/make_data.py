"""Write the data of the agent example: tasks of two turns, and a tokenizer of digits.

    python examples/agent/make_data.py outputs/agent/data

See lookup.py for the task. A record of a task is a message and what the environment has to know.

    warm_start.jsonl  dialogues for engine: file, six to each task: either shelf is opened, and
                      either digit that lies in it is said, or the shelf's own. So the warm start
                      solves a task one time in six.
    tasks.jsonl       tasks for GRPO.
    unseen.jsonl      tasks about pairs of shelves that the other two files do not have.
    tokenizer/        words between spaces, with a chat template.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

WORDS = [*"0123456789", ">", ";", "?", "!"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '> ' + m.content + ' ; ' }}"
    "{% else %}{{ m.content + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
HELD_OUT = 20

Pair = tuple[str, str]


def make_tasks(pairs: Sequence[Pair], count: int, rng: random.Random) -> list[dict[str, Any]]:
    """`count` tasks about these pairs of shelves in turn."""
    return [_task(pair, rng) for pair in itertools.islice(itertools.cycle(pairs), count)]


def _task(pair: Pair, rng: random.Random) -> dict[str, Any]:
    shelves = {shelf: rng.sample("0123456789", 2) for shelf in pair}
    return {
        "messages": [{"role": "user", "content": f"{pair[0]} {pair[1]} ?"}],
        "answer": {
            "shelves": {shelf: " ".join(digits) for shelf, digits in shelves.items()},
            "shelf": pair[1],
            "digit": shelves[pair[1]][1],
        },
    }


def make_dialogues(tasks: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The six dialogues of each task, as records of one group."""
    for group, task in enumerate(tasks):
        for shelf, digits in task["answer"]["shelves"].items():
            for digit in (*digits.split(), shelf):
                turns = [("assistant", shelf), ("tool", digits), ("assistant", digit)]
                said = [{"role": role, "content": content} for role, content in turns]
                yield {"group": group, "messages": [*task["messages"], *said], "reward": 0.0}


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words that transformers loads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=WORDS[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=";")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One record per line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the files are written")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    args = parser.parse_args(arguments)
    rng = random.Random(args.seed)
    pairs = list(itertools.permutations("0123456789", 2))
    rng.shuffle(pairs)
    known, unseen = pairs[HELD_OUT:], pairs[:HELD_OUT]
    args.folder.mkdir(parents=True, exist_ok=True)
    write(args.folder / "warm_start.jsonl", make_dialogues(make_tasks(known, 2000, rng)))
    write(args.folder / "tasks.jsonl", make_tasks(known, 1000, rng))
    write(args.folder / "unseen.jsonl", make_tasks(unseen, 200, rng))
    save_tokenizer(args.folder / "tokenizer")


if __name__ == "__main__":
    main()
