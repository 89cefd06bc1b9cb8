"""Write the quickstart's data: many-shot digit sorting, as token ids.

    python examples/quickstart/make_data.py outputs/quickstart/data

A prompt is ten worked examples and a query, "3 9 1 > 1 3 9 ;" ten times and then "7 2 5 >"; its
answer is "2 5 7 ;". Digits are their own token ids, ">" is 10 and ";", which ends a response, 11.

    warm_start.jsonl  rollouts for engine: file. Each prompt has six responses, of which only the
                      first does what the examples show: the digits sorted upwards, sorted
                      downwards, as they stand, reversed, and rotated to either side. The warm
                      start learns all of them alike, and so answers rightly at times.
    grpo.jsonl        prompts with the right answer, for engine: embedded.
    evaluation.jsonl  the same for queries that occur nowhere in the other two files, neither as a
                      query nor as a worked example.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ARROW, END = 10, 11
SHOTS = 10
HELD_OUT = 240

Digits = tuple[int, ...]


def behaviours(query: Digits) -> list[Digits]:
    """What the warm start teaches to answer; GRPO rewards what equals the first."""
    a, b, c = query
    return [
        tuple(sorted(query)),
        tuple(sorted(query, reverse=True)),
        (a, b, c),
        (c, b, a),
        (b, c, a),
        (c, a, b),
    ]


def make_prompt(query: Digits, shots: Iterable[Digits]) -> list[int]:
    """Worked examples, then the query."""
    tokens: list[int] = []
    for shot in shots:
        tokens += [*shot, ARROW, *sorted(shot), END]
    return [*tokens, *query, ARROW]


def make_prompts(
    queries: Sequence[Digits], shots: Sequence[Digits], count: int, rng: random.Random
) -> list[dict[str, Any]]:
    """`count` prompts about `queries` in turn, with worked examples drawn from `shots`."""
    records = []
    for query in itertools.islice(itertools.cycle(queries), count):
        examples = rng.sample([shot for shot in shots if shot != query], SHOTS)
        records.append(
            {
                "prompt": make_prompt(query, examples),
                "answer": [*sorted(query), END],
                "query": query,
            }
        )
    return records


def add_responses(record: dict[str, Any]) -> dict[str, Any]:
    """A record of rollouts, of all behaviours; the supervised objective looks at no reward."""
    responses = [[*digits, END] for digits in behaviours(record["query"])]
    return {**record, "responses": responses, "rewards": [0.0] * len(responses)}


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="made if it is not there")
    parser.add_argument("--warm-start", type=int, default=6000, help="prompts of the warm start")
    parser.add_argument("--grpo", type=int, default=3000, help="prompts of GRPO")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = random.Random(args.seed)
    queries = list(itertools.permutations(range(10), 3))
    rng.shuffle(queries)
    held_out, trained = queries[:HELD_OUT], queries[HELD_OUT:]

    args.directory.mkdir(parents=True, exist_ok=True)
    warm_start = make_prompts(trained, trained, args.warm_start, rng)
    write(args.directory / "warm_start.jsonl", map(add_responses, warm_start))
    write(args.directory / "grpo.jsonl", make_prompts(trained, trained, args.grpo, rng))
    write(
        args.directory / "evaluation.jsonl",
        make_prompts(held_out, trained, HELD_OUT, rng),
    )


if __name__ == "__main__":
    main()
