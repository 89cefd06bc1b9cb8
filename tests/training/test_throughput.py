"""How fast a run says that it is, and where its time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_prefix.config import RunConfig
from megatron_prefix.config.loader import ConfigError, load_dataclass
from tests.distributed import run_distributed
from tests.megatron.models import HAS_HYBRID_MODEL, MAMBA
from tests.training.runs import good_records, read_rows, run_values, trainer, write_records

PEAK = 0.25
RUNS: dict[str, dict[str, Any]] = {
    "one pass": {},
    "reference": {"objective": {"kl_coefficient": 0.1}},
    "old policy, two epochs": {"training": {"epochs_per_rollout": 2}},
}


def _runs(rank: int, world_size: int, folder: Path) -> None:
    for name, sections in RUNS.items():
        values = run_values(
            folder / name,
            records=folder / "records.jsonl",
            objective=sections.get("objective", {}),
            training={"steps": 3, "peak_tflops": PEAK, **sections.get("training", {})},
            output={"save_every": 2, "save_in_background": False, "save_last": False},
        )
        with trainer(values) as run:
            run.run()


def test_throughput_counts_every_pass_and_every_rank_and_phases_add_up(tmp_path: Path) -> None:
    write_records(tmp_path / "records.jsonl", good_records(4))
    run_distributed(_runs, 2, tmp_path)
    teraflops = {}
    for name in RUNS:
        rows = read_rows(tmp_path / name)
        for row in rows:
            assert row["tokens_per_second_per_gpu"] == pytest.approx(row["tokens_per_second"] / 2)
            assert row["mfu"] == pytest.approx(row["tflops_per_second_per_gpu"] / PEAK)
            parts = [row[f"{part}_seconds"] for part in ("plan", "logprob", "optimizer")]
            assert 0 < sum(parts) <= row["train_seconds"] * 1.01 + 1e-3
            assert row["rollout_seconds"] > 0
        assert ["save_seconds" in row for row in rows] == [False, False, True]
        teraflops[name] = [r["tflops_per_second_per_gpu"] * r["train_seconds"] for r in rows]
    # Forward and backward are three passes; a reference policy is a fourth. Two epochs are six, and
    # the old policy's log-probabilities a seventh.
    first = teraflops["one pass"]
    assert teraflops["reference"] == pytest.approx([4 / 3 * found for found in first], rel=1e-6)
    assert teraflops["old policy, two epochs"] == pytest.approx(
        [7 / 3 * found for found in first], rel=1e-6
    )


@pytest.mark.skipif(not HAS_HYBRID_MODEL, reason="megatron-core before 0.18")
def test_throughput_counts_mamba_layers(tmp_path: Path) -> None:
    records = write_records(tmp_path / "records.jsonl", good_records(2))
    flops = {}
    for pattern in ("*-", "M*-", "M*-M"):
        # The same rows whatever the layers cost.
        training = {"steps": 1, "trim_last_layer": False, "share_only_where_it_pays": False}
        values = run_values(tmp_path / pattern, records=records, training=training)
        values["model"]["hybrid_layer_pattern"] = pattern
        del values["model"]["transformer"]["num_layers"]
        values["model"]["transformer"] |= MAMBA
        with trainer(values) as run:
            run.run()
        (row,) = read_rows(tmp_path / pattern)
        computed = row["tflops_per_second_per_gpu"] * row["train_seconds"] * 1e12
        flops[pattern] = computed / row["tokens_computed"]
    # Of the hidden size 32: x and gate of 4 heads of 8, B and C of 2 groups of 6, and 4 steps, and
    # back from what is read; the convolution of x, B and C; the products of chunks of 64.
    projections = 2 * 32 * (2 * 32 + 2 * 12 + 4 + 32)
    convolution = 2 * 4 * (32 + 2 * 12)
    chunks = 2 * 64 * 12 + 4 * (2 * 64 * 8 + 2 * 2 * 6 * 8)
    of_layer = 3 * (projections + convolution + chunks)
    assert flops["M*-"] - flops["*-"] == pytest.approx(of_layer, rel=1e-6)
    assert flops["M*-M"] - flops["*-"] == pytest.approx(2 * of_layer, rel=1e-6)


def test_a_peak_is_above_nothing_and_without_one_there_is_no_utilisation(tmp_path: Path) -> None:
    records = write_records(tmp_path / "records.jsonl", good_records(2))
    values = run_values(tmp_path / "out", records=records, output={"save_last": False})
    with trainer(values) as run:
        run.run()
    for row in read_rows(tmp_path / "out"):
        assert "mfu" not in row and row["tflops_per_second_per_gpu"] > 0
    values["training"]["peak_tflops"] = 0
    with pytest.raises(ConfigError, match=r"training\.peak_tflops: 0\.0 must be above 0"):
        load_dataclass(RunConfig, values)
