"""The benchmark: rows of the promised form, and none for sides that compute different things."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"
SIZES = ["--layers", "1", "--hidden", "32", "--heads", "4", "--kv-heads", "2", "--ffn", "48"]


QUICK = ["--repeats", "1", "--seconds", "0.05"]


def test_a_row_per_case_with_the_promised_keys() -> None:
    cases = ["--case", "2,16,4", "--case", "1,8,8"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(TOOL), "--json", *QUICK, *SIZES, *cases],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout.splitlines()[-1])["rows"]
    for row in (first, second):
        assert row.keys() >= {
            "G",
            "prefix",
            "response",
            "time_ratio",
            "flops_ratio",
            "share",
            "peak_mb_grouped",
            "peak_mb_ungrouped",
        }
        assert row["share"] == pytest.approx(row["time_ratio"] / row["flops_ratio"])
        assert row["time_ratio"] > 0
    assert (first["G"], first["prefix"], first["response"]) == (2, 16, 4)
    # 40 tokens against 24; with a group of one there is nothing to share.
    assert 1.2 < first["flops_ratio"] < 2
    assert second["flops_ratio"] == pytest.approx(1.0)


def test_a_case_of_another_form_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(TOOL), "--case", "2,16"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert "'2,16' is not G,prefix,response" in done.stderr


def _compare_sides(rank: int, world_size: int) -> list[str]:
    """What check_equal says of equal sides, other tokens, and another loss."""
    sys.path.insert(0, str(TOOL.parent))
    import argparse

    import benchmark

    from megatron_prefix.training.config import ParallelConfig
    from megatron_prefix.training.model import build_model_chunks
    from megatron_prefix.training.runtime import runtime

    args = argparse.Namespace(vocab=64, layers=1, hidden=32, heads=4, kv_heads=2, ffn=48)
    shape = benchmark.Shape(group_size=2, prefix=9, response=5)
    trees = benchmark.trees(shape, args.vocab, 0)
    other = benchmark.trees(shape, args.vocab, 1)
    messages = []
    with runtime(ParallelConfig(), device="cpu", seed=0, timeout_minutes=1):
        chunks = build_model_chunks(
            benchmark.model_config(args),
            ParallelConfig(),
            benchmark.TRAINING,
            use_distributed_optimizer=False,
        )
        grouped = benchmark.make_batch(trees["grouped"], shape)
        flipped = grouped.params.position_ids.flip(0)
        shifted = dataclasses.replace(
            grouped, params=dataclasses.replace(grouped.params, position_ids=flipped)
        )
        doubled = dataclasses.replace(grouped, weights=grouped.weights * 2)
        for side in (grouped, benchmark.make_batch(other["grouped"], shape), shifted, doubled):
            batches = {
                "grouped": side,
                "ungrouped": benchmark.make_batch(trees["ungrouped"], shape),
            }
            try:
                benchmark.check_equal(chunks, batches)
                messages.append("equal")
            except RuntimeError as error:
                messages.append(str(error))
    assert torch.get_default_dtype() == torch.float32
    return messages


def test_sides_that_compute_different_things_get_no_ratio() -> None:
    equal, *different = run_distributed(_compare_sides, 1)[0]
    assert equal == "equal"
    for message in different:
        assert "differ" in message and "no ratio is reported" in message


def test_context_parallel_rows_show_what_travelled() -> None:
    tool = TOOL.with_name("benchmark_context_parallel.py")
    case = ["--case", "4,64,16", "--repeats", "1", "--json"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(tool), *case, *SIZES],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["kind"]: row for row in json.loads(done.stdout.splitlines()[-1])["rows"]}
    assert rows.keys() == {"all_gather", "p2p", "a2a"}
    for kind in ("all_gather", "p2p"):
        row = rows[kind]
        # 63 sharded tokens, keys and values of 2 heads of 8 float32: one rank has 31, one 32.
        assert row["forward_bytes"] == 32 * 2 * 2 * 8 * 4
        assert row["least_forward_bytes"] == 63 * 2 * 2 * 8 * 4 // 2
        assert row["backward_bytes"] > row["forward_bytes"]
        assert row["seconds"] > 0
