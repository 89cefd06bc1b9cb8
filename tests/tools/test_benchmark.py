"""The benchmark: rows of the promised form, and none for sides that compute different things."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests import fork_server
from tests.commands import run_python
from tests.distributed import run_distributed

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"
SIZES = ["--layers", "1", "--hidden", "32", "--heads", "4", "--kv-heads", "2", "--ffn", "48"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/benchmark.py"""
    monkeypatch.syspath_prepend(str(TOOL.parent))
    monkeypatch.setattr(sys, "argv", [str(TOOL)])
    import benchmark

    return benchmark


@pytest.fixture
def last_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """Runs a tool here, so that its processes come from the tests' server, to its last line."""

    def run(tool: Path, *arguments: str) -> dict[str, Any]:
        fork_server.ensure_running()
        monkeypatch.syspath_prepend(str(tool.parent))
        monkeypatch.setattr(sys, "argv", [str(tool), *arguments])
        assert importlib.import_module(tool.stem).main() == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


QUICK = ["--repeats", "1", "--seconds", "0.05"]


def test_a_row_per_side_with_the_promised_keys(
    tmp_path: Path, last_line: Callable[..., dict[str, Any]]
) -> None:
    png = tmp_path / "times.png"
    arguments = ["--json", *QUICK, *SIZES, "--case", "2,16,4-6", "--png", str(png)]
    report = last_line(TOOL, *arguments)
    assert report["environment"]["torch"] == torch.__version__
    rows = report["rows"]
    assert [row["side"] for row in rows] == ["grouped", "ungrouped"]
    for row in rows:
        assert (row["G"], row["prefix"], row["response"]) == (2, 16, "4-6")
        assert row["time_ratio_least"] <= row["time_ratio"] <= row["time_ratio_most"]
        assert row["time_ratio"] > 0 and row["peak_mb"] is not None
        assert row["share"] == pytest.approx(row["time_ratio"] / row["flops_ratio"])
    assert rows[0]["flops_ratio"] == 1 < rows[1]["flops_ratio"] < 2
    assert png.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "2,16"], "'2,16' is not G,prefix,response"),
        (["--case", "2,0,5"], "'2,0,5' is not G,prefix,response"),
        (["--sides", "ungrouped"], "--sides: grouped must be one of them"),
        (["--sides", "grouped", "flex"], "no backward on the CPU"),
        (["--sides", "grouped", "prefix_grouper", "--level", "layer"], "only at --level step"),
        (["--sides", "grouped", "ungrouped_rows", "--level", "layer"], "only at --level step"),
    ],
)
def test_arguments_that_make_no_comparison_are_refused(
    arguments: list[str], message: str, benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    sys.argv[1:] = arguments
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "benchmark.py",
        "benchmark_series.py",
        "benchmark_context_parallel.py",
        "benchmark_skipping.py",
    ],
)
def test_the_tools_are_programs(name: str) -> None:
    done = run_python([TOOL.with_name(name), "--case", "2,16"])
    assert done.returncode == 2
    assert "'2,16' is not G,prefix,response" in done.stderr


def _compare(rank: int, world_size: int) -> dict[str, Any]:
    """Every mechanism at every level, and what is said of sides that compute something else."""
    sys.path.insert(0, str(TOOL.parent))
    import benchmarks.levels as levels
    import benchmarks.names as names
    from benchmarks.measuring import check_equal
    from benchmarks.shapes import ModelSizes, parse_case

    sizes = ModelSizes(layers=1, hidden=32, heads=4, kv_heads=2, ffn=48, vocab=64, qkv_bias=True)
    found: dict[str, Any] = {"equal": [], "messages": []}
    sides = ["grouped", "ungrouped", "dense_mask", "kv_copy"]
    for text in ("3,9,5", "3,20,1-17", "1,9,5", "2,1,6"):
        for level in names.LEVELS:
            case = levels.Case(level=level, shape=parse_case(text), sizes=sizes, dtype="float64")
            more = [names.ROWS] if level == "step" else []
            more += names.PEERS if level == "step" and not text.startswith("2,1,") else []
            with levels.build_runners(case, sides + more) as runners:
                check_equal(runners, tolerance=1e-5)
                found["equal"].append((text, level, *runners))
    for text in ("3,9,5", "3,9,6"):
        case = levels.Case(level="step", shape=parse_case(text), sizes=sizes)
        with levels.build_runners(case, ["grouped", "ungrouped"]) as runners:
            if text == "3,9,5":
                batch = runners["grouped"]._batches[0]
                batch.weights.mul_(2)
            else:
                batch = runners["ungrouped"]._batches[0]
                batch.input_ids[:, 3] = (batch.input_ids[:, 3] + 1) % 64
            try:
                check_equal(runners, tolerance=2e-3)
            except RuntimeError as error:
                found["messages"].append(str(error))
    return found


def test_all_sides_agree_at_every_level_and_others_get_no_ratio() -> None:
    found = run_distributed(_compare, 1)[0]
    assert len(found["equal"]) == 12
    assert len(found["messages"]) == 2
    for message in found["messages"]:
        assert "differ" in message and "no ratio is reported" in message


def test_context_parallel_rows_show_what_travelled(
    last_line: Callable[..., dict[str, Any]],
) -> None:
    tool = TOOL.with_name("benchmark_context_parallel.py")
    case = ["--case", "4,64,16", "--repeats", "1", "--json"]
    rows = {row["kind"]: row for row in last_line(tool, *case, *SIZES)["rows"]}
    assert rows.keys() == {"all_gather", "p2p", "a2a"}
    for kind in ("all_gather", "p2p"):
        row = rows[kind]
        # 63 sharded tokens, keys and values of 2 heads of 8 float32: one rank has 31, one 32.
        assert row["forward_bytes"] == 32 * 2 * 2 * 8 * 4
        assert row["least_forward_bytes"] == 63 * 2 * 2 * 8 * 4 // 2
        assert row["backward_bytes"] > row["forward_bytes"]
        assert row["seconds"] > 0


SERIES = TOOL.with_name("benchmark_series.py")


def test_a_series_beside_pieces_computes_the_same_with_fewer_tokens(
    last_line: Callable[..., dict[str, Any]],
) -> None:
    case = ["--case", "12,60,20", "--token-budget", "120", "--repeats", "1", "--dtype", "float64"]
    report = last_line(SERIES, *case, "--json", *SIZES)
    series, pieces = report["sides"]["series"], report["sides"]["pieces"]
    # 59 positions of the prompt, and 61 for three responses: four rows.
    assert series["rows_with_responses"] == pieces["rows_with_responses"] == 4
    assert pieces["tokens"] - series["tokens"] == 3 * 59
    assert report["flops_ratio"] == pieces["forward_flops"] / series["forward_flops"] > 1
    assert report["share"] == pytest.approx(report["time_ratio"] / report["flops_ratio"])
    assert report["time_ratio_least"] <= report["time_ratio"] <= report["time_ratio_most"]
    assert 0 < report["gradient_error"] < 1e-12
    assert all(side["seconds"] > 0 and side["peak_mb"] is not None for side in (series, pieces))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (["--case", "4,30,5"], "--case 4,30,5 --token-budget 8192: nothing to share across"),
        (["--case", "2,60,70", "--token-budget", "99"], "over token_budget=99"),
    ],
)
def test_a_case_without_a_series_is_refused(
    case: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fork_server.ensure_running()
    monkeypatch.syspath_prepend(str(SERIES.parent))
    monkeypatch.setattr(sys, "argv", [str(SERIES), *case, *SIZES, "--no-memory", "--repeats", "1"])
    assert importlib.import_module("benchmark_series").main() == 2
    assert message in capsys.readouterr().err


SKIPPING = TOOL.with_name("benchmark_skipping.py")


def test_groups_of_equal_rewards_cost_nothing_where_they_are_skipped(
    last_line: Callable[..., dict[str, Any]],
) -> None:
    """The numbers of tokens and FLOPs are exact; the rows that run are the same to the bit."""
    case = ["--case", "4,24,8", "--groups", "4", "--equal", "1", "3", "--repeats", "1"]
    report = last_line(SKIPPING, *case, "--json", *SIZES)
    for row, ratio in zip(report["rows"], (4 / 3, 4), strict=True):
        assert row["flops_ratio"] == row["tokens"]["keep"] / row["tokens"]["skip"] == ratio
        assert row["gradient_error"] == 0
        assert row["share"] == pytest.approx(row["time_ratio"] / ratio)
        assert all(seconds > 0 for values in row["seconds"].values() for seconds in values)


def test_a_batch_of_equal_rewards_alone_is_refused() -> None:
    done = run_python([SKIPPING, "--groups", "4", "--equal", "4"])
    assert done.returncode == 2
    assert "--equal: 4 must be from 0 to 3, below --groups" in done.stderr
