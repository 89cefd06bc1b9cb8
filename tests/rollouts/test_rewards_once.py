"""Rewards of finished rollouts are computed on one rank, and all ranks have them or the error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron_prefix.distributed.rank_results import on_rank_0, raise_together
from megatron_prefix.rollouts.rewards import load_reward
from tests.distributed import run_distributed
from tests.training.runs import read_rows, run_values, trainer

from .files import engine, write

MODULE = """
import os

def reward(prompt, response, answer):
    with open(answer["calls"], "a") as file:
        file.write(f"{os.getppid()} {list(prompt)} {list(response)}\\n")
    if answer.get("fails"):
        raise RuntimeError("no judge")
    return float(len(response))
"""

FIVE = [[1], [2, 3], [4, 5, 6], [7], [8, 9]]


def _records(calls: Path, **answer: Any) -> list[dict[str, Any]]:
    """A whole group and one of a record for each response; of both, some rewards are there."""
    answer = {"calls": str(calls), **answer}
    flat = [
        {"group": 1, "prompt": [7], "response": response, "answer": answer} for response in FIVE[2:]
    ]
    flat[1]["reward"] = 0.25
    return [
        {"prompt": [5, 6], "responses": FIVE[:2], "answer": answer},
        {"prompt": [5], "responses": FIVE[:2], "answer": answer, "rewards": [0.5, 0.75]},
        *flat,
    ]


EXPECTED = [(1.0, 2.0), (0.5, 0.75), (3.0, 0.25, 2.0)]


def _called(calls: Path) -> list[tuple[str, str]]:
    """The process that started each call's own, and the call's arguments."""
    lines = calls.read_text().splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def _train(rank: int, world_size: int, folder: Path, records: Path) -> dict[str, Any]:
    sys.path.insert(0, str(folder))
    values = run_values(
        folder / "out",
        records=records,
        rollouts={"reward": "counting:reward", "groups_per_step": 3, "epochs": 1},
        training={"steps": 2},
    )
    found: dict[str, Any] = {}
    with trainer(values) as run:
        try:
            found["metrics"] = run.run()
        except ValueError as error:
            found["error"] = str(error)
    return found


def test_a_run_computes_each_reward_once(tmp_path: Path) -> None:
    (tmp_path / "counting.py").write_text(MODULE)
    calls = tmp_path / "calls"
    records = write(tmp_path / "records.jsonl", _records(calls))
    run_distributed(_train, 2, tmp_path, records, timeout=120)
    called = _called(calls)
    assert sorted(arguments for _, arguments in called) == [
        "[5, 6] [1]",
        "[5, 6] [2, 3]",
        "[7] [4, 5, 6]",
        "[7] [8, 9]",
    ]
    assert len({process for process, _ in called}) == 1
    (row,) = read_rows(tmp_path / "out")
    assert row["reward"] == sum(map(sum, EXPECTED)) / 7


def test_a_reward_that_fails_ends_the_run_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "counting.py").write_text(MODULE)
    calls = tmp_path / "calls"
    records = write(tmp_path / "records.jsonl", _records(calls, fails=True))
    first, second = run_distributed(_train, 2, tmp_path, records, timeout=120)
    assert first == second
    assert f"{records}:1: responses[0]: reward counting:reward failed: " in first["error"]
    assert "no judge" in first["error"]
    assert len({process for process, _ in _called(calls)}) == 1


def _read(rank: int, world_size: int, folder: Path, name: str) -> list[Any]:
    """Two batches of a file that rank 1 has in another form."""
    sys.path.insert(0, str(folder))
    path = folder / (name if rank == 1 else "good.jsonl")
    reader = engine(path, reward=load_reward("counting:reward"), run_once=on_rank_0, epochs=1)
    try:
        with raise_together():
            groups = reader.next_groups(3, step=0)
    except ValueError as error:
        return [str(error), reader.state_dict()["number"]]
    finally:
        reader.close()
    return [group.rewards for group in groups]


def test_ranks_that_read_different_files_end_with_an_error_and_do_not_wait(tmp_path: Path) -> None:
    (tmp_path / "counting.py").write_text(MODULE)
    good = _records(tmp_path / "calls")
    write(tmp_path / "good.jsonl", good)
    assert run_distributed(_read, 2, tmp_path, "good.jsonl") == 2 * [EXPECTED]

    bad = write(tmp_path / "bad.jsonl", [{"prompt": [5, 6], "responses": FIVE[:2]}, *good[1:]])
    message = f"rank 1 of 2: {bad}:1: rewards: missing, and so is answer; a record needs one of"
    first, second = run_distributed(_read, 2, tmp_path, "bad.jsonl")
    assert first[0].startswith(message) and second == [first[0], 0]

    other = write(tmp_path / "other.jsonl", good)
    first, second = run_distributed(_read, 2, tmp_path, "other.jsonl")
    assert first[0].startswith("rank 1 of 2: this rank has read other rollouts than the rank")
    assert second == [first[0], 0] and other.is_file()
