"""The benchmark of the host's work runs the trainer's own code, and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import run_python

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark_host.py"
SMALL = ("--groups", "6", "--responses", "4", "--prompt-tokens", "9", "--response-tokens", "20")


def _run(*options: str) -> dict[str, Any]:
    done = run_python([TOOL, *SMALL, "--token-budget", "128", *options], timeout=150)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_every_part_is_measured_on_a_reader_and_on_another_rank(form: str) -> None:
    result = _run("--dp", "2", "--format", form, "--repeats", "1", "--lengths", "lognormal")
    parts = result["seconds"]
    assert list(parts) == [
        *("read", "validate", "summary", "plan", "check", "distribute", "pack", "copy")
    ]
    assert all(seconds > 0 for seconds in parts.values())
    assert result["total_s"] == pytest.approx(sum(list(parts.values())[2:]))
    assert result["plan_s"] == parts["plan"]
    assert 0 < result["rank_mb"] < result["reader_mb"]
    assert result["flops_max_over_mean"] >= 1 and 0 < result["fill"] <= 1
    assert result["prefixes_run_again"] >= 0


def test_the_plan_of_a_cluster_needs_no_data() -> None:
    result = _run("--ranks", "16", "--tp", "2", "--cp", "2", "--repeats", "1")
    assert list(result["seconds"]) == ["plan"] and result["rank_mb"] is None
    assert result["data_parallel_size"] == 4
    # 6 groups of a prompt and 4 responses.
    assert result["tokens"] == 6 * (9 + 4 * 20)


def test_lengths_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lengths.json"
    path.write_text('[{"prefix": 7, "responses": [3, 9]}, {"prefix": 1, "responses": [4, 4]}]')
    result = _run("--ranks", "2", "--repeats", "1", "--lengths", str(path))
    assert (result["groups"], result["responses"], result["tokens"]) == (2, 2, 28)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "6", "--tp", "4"], "--ranks 6: must be a multiple of --tp x --pp x --cp = 4"),
        (["--dp", "0"], "--dp 0: must be at least 1"),
        (["--lengths", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_arguments_are_named(options: list[str], message: str) -> None:
    done = run_python([TOOL, *SMALL, *options])
    assert done.returncode == 2 and message in done.stderr
