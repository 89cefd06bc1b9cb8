"""Finished rollouts are read and rewarded on rank 0 alone; all ranks have its errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron_prefix.distributed.rank_results import rank_0_alone
from megatron_prefix.rollouts.rewards import load_reward
from tests.distributed import run_distributed
from tests.training.runs import read_rows, run_values, trainer

from .files import engine, plain, write

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


def _read(rank: int, world_size: int, folder: Path, name: str) -> tuple[Any, Any]:
    """A batch of a file that is on rank 0 alone, and the state after it."""
    sys.path.insert(0, str(folder))
    reader = engine(
        folder / (name if rank == 0 else "nowhere"),
        reward=load_reward("counting:reward"),
        reads=rank == 0,
        run_alone=rank_0_alone,
        epochs=1,
    )
    try:
        batch = reader.next_rollouts(3, step=0)
    except ValueError as error:
        return str(error), reader.state_dict()
    finally:
        reader.close()
    found = None if batch is None else [group.rewards for group in plain(batch)]
    return found, reader.state_dict()


def test_rank_0_alone_reads_and_all_ranks_have_its_errors(tmp_path: Path) -> None:
    (tmp_path / "counting.py").write_text(MODULE)
    good = _records(tmp_path / "calls")
    write(tmp_path / "good.jsonl", good)
    (rewards, state), (nothing, other_state) = run_distributed(_read, 2, tmp_path, "good.jsonl")
    assert rewards == EXPECTED and state["number"] == 5
    assert nothing is None and other_state == {}

    bad = write(tmp_path / "bad.jsonl", [{"prompt": [5, 6], "responses": FIVE[:2]}, *good[1:]])
    (error, state), (same, _) = run_distributed(_read, 2, tmp_path, "bad.jsonl")
    message = f"{bad}:1: rewards: missing, and so is answer; a record needs one of"
    assert error == same and error.startswith(message)
    assert state["number"] == 0
