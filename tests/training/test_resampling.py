"""Groups that teach nothing are replaced by groups of further batches, also over a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_prefix.model.full_tensors import FullTensors, full_parameters
from tests.distributed import run_distributed
from tests.training.runs import (
    good_records,
    read_rows,
    run_values,
    trainer,
    without_times,
    write_records,
)

# Batches of two groups. The first step takes 0, 4 of three batches and leaves 5, the second 7, 8 of
# two; the third finds nothing in the last batch.
TEACHING = [
    *(True, False),
    *(False, False),
    *(True, True),
    *(False, True),
    *(True, False),
    *(False, False),
]
CHOSEN = [0, 4, 7, 8]


def _records() -> list[dict[str, Any]]:
    records = good_records(len(TEACHING))
    for record, teaches in zip(records, TEACHING, strict=True):
        if not teaches:
            record["rewards"] = [0.25] * 4
    return records


def _values(folder: Path, name: str, records: str, steps: int, **objective: Any) -> dict[str, Any]:
    return run_values(
        folder / name,
        records=folder / records,
        training={"steps": steps},
        objective=objective,
        rollouts={"epochs": 1},
        output={"save_every": 1},
    )


def _train(values: dict[str, Any]) -> FullTensors | None:
    with trainer(values) as run:
        run.run()
        return full_parameters(run.chunks)


def _runs(rank: int, world_size: int, folder: Path) -> dict[str, FullTensors | None]:
    resample = {"zero_advantages": "resample"}
    found = {"chosen": _train(_values(folder, "chosen", "chosen.jsonl", 2))}
    found["two steps"] = _train(_values(folder, "run", "all.jsonl", 2, **resample))
    # The same run goes on, and one that was never stopped.
    found["resumed"] = _train(_values(folder, "run", "all.jsonl", 3, **resample))
    found["whole"] = _train(_values(folder, "whole", "all.jsonl", 3, **resample))
    limited = {**resample, "resample_limit": 1}
    found["limited"] = _train(_values(folder, "limited", "all.jsonl", 3, **limited))
    return found


def test_batches_are_filled_up_and_a_run_continues_bit_for_bit(tmp_path: Path) -> None:
    records = _records()
    write_records(tmp_path / "all.jsonl", records)
    write_records(tmp_path / "chosen.jsonl", [records[index] for index in CHOSEN])
    found = run_distributed(_runs, 2, tmp_path)[0]
    for first, second in (("two steps", "chosen"), ("resumed", "whole")):
        for name, expected in found[second].items():
            assert torch.equal(found[first][name], expected), (first, name)

    rows = read_rows(tmp_path / "run")
    assert [row["sampled_groups"] for row in rows] == [6, 4, 2]
    assert [row["zero_advantage_fraction"] for row in rows] == [0, 0, 1]
    # The mean of 1, 0, .5, .25 is .4375; of six groups three have it, and three .25.
    assert rows[0]["sampled_reward"] == 0.34375
    assert rows[0]["reward"] == 0.4375
    for row, expected in zip(rows, read_rows(tmp_path / "whole"), strict=True):
        assert without_times(row) == without_times(expected)
    # One further batch at most: a step of group 0 alone, one of 4 and 5, one of 7 and 8.
    limited = read_rows(tmp_path / "limited")
    assert [row["sampled_groups"] for row in limited] == [4, 2, 4]
    assert [row["zero_advantage_fraction"] for row in limited] == [0, 0, 0]
