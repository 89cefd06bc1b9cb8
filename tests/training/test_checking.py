"""`--check`: what a run would meet, without a step of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.training.runs import (
    good_records,
    run_command,
    run_values,
    write_config,
    write_records,
)

NOTHING = "checked: nothing is wrong with this; nothing was trained or written"


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    dull = {**good_records(1)[0], "rewards": [0.5] * 4}
    records = write_records(tmp_path / "rollouts.jsonl", [*good_records(4), dull])
    return run_values(tmp_path / "out", records=records)


def _commands(
    rank: int, world_size: int, commands: list[tuple[Path, tuple[str, ...]]]
) -> list[tuple[int, str]]:
    return [run_command(config, *words) for config, words in commands]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.name != "run.yaml")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_good_run_is_described_and_leaves_nothing(
    tmp_path: Path, values: dict[str, Any], processes: int
) -> None:
    values["objective"] = {"kl_coefficient": 0.1}
    config = write_config(tmp_path / "run.yaml", values)
    before = _files(tmp_path)
    found = run_distributed(_commands, processes, [(config, ("--check",))])
    assert [of_rank[0][0] for of_rank in found] == [0] * processes
    text = found[0][0][1]
    assert "random weights" in text and "steps: 2 to do of 2" in text
    assert (
        "records: 5 groups of 20 responses with 70 tokens, the longest sequence 14 tokens; in 1 "
        "groups all rewards are equal\n"
    ) in text
    assert text.endswith(f"{NOTHING}\n")
    assert "step 1/2" not in text
    assert _files(tmp_path) == before


def test_a_run_that_would_go_on_is_left_as_it_is(tmp_path: Path, values: dict[str, Any]) -> None:
    config = write_config(tmp_path / "run.yaml", values)
    fresh = write_config(
        tmp_path / "fresh.yaml", {**values, "output": {**values["output"], "resume": False}}
    )
    (found,) = run_distributed(
        _commands, 1, [(config, ()), (config, ("--check",)), (fresh, ("--check",))]
    )
    assert [status for status, _ in found] == [0, 0, 0]
    assert "resumed after step 2" in found[1][1] and "steps: 0 to do of 2" in found[1][1]
    assert "random weights" in found[2][1] and "steps: 2 to do of 2" in found[2][1]
    folder = tmp_path / "out"
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "evaluations.jsonl",
        "metrics.jsonl",
        "samples.jsonl",
    ]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000002"]


def test_a_wrong_record_that_the_first_steps_do_not_read_is_found(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    records = good_records(6)
    records[5]["responses"][1] = [1] * 60
    write_records(tmp_path / "rollouts.jsonl", records)
    config = write_config(tmp_path / "run.yaml", values)
    ((status, text),) = run_distributed(_commands, 1, [(config, ("--check",))])[0]
    assert status == 1
    assert text.splitlines()[-1].startswith(f"error: {tmp_path}/rollouts.jsonl:6: responses[1]: ")


def test_a_group_that_no_microbatch_holds_is_found(tmp_path: Path, values: dict[str, Any]) -> None:
    values["training"] |= {"token_budget": 8}
    config = write_config(tmp_path / "run.yaml", values)
    ((status, text),) = run_distributed(_commands, 1, [(config, ("--check",))])[0]
    assert status == 1
    assert "token_budget" in text.splitlines()[-1] and ".jsonl:" in text.splitlines()[-1]


def test_prompts_are_read_to_the_end_and_too_few_are_said(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    prompts = [{"prompt": [1, 2, 3], "answer": [4]}, {"prompt": [5, 6], "answer": [7]}]
    write_records(tmp_path / "rollouts.jsonl", [json.dumps(prompt) for prompt in prompts])
    values["rollouts"] |= {
        "engine": "embedded",
        "group_size": 2,
        "max_response_length": 4,
        "reward": "exact_match",
        "groups_per_step": 3,
    }
    config = write_config(tmp_path / "run.yaml", values)
    ((status, text), (_, once)) = run_distributed(
        _commands, 1, [(config, ("--check",)), (config, ("--check", "rollouts.epochs=2"))]
    )[0]
    assert status == 0, text
    assert "records: 2 prompts with 5 tokens, the longest 3; 2 have an answer\n" in text
    assert (
        "records: a step holds some of them more than once: rollouts.groups_per_step: 3 is more "
        "than the 2 that there are\n"
    ) in text
    assert "records: they last for 1 of the 2 steps, with rollouts.epochs: 2 and " in once
