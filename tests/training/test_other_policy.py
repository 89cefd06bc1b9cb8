"""Log-probabilities of another policy than the one that is trained are told at the first step."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import VOCAB_SIZE, good_records, run_values, trainer, write_records

OWN = -math.log(VOCAB_SIZE)
"""About what a model of random weights gives to each token."""
RENORMALISED = OWN + 2.0


@pytest.mark.parametrize("correction", [None, {"kind": "truncate"}])
def test_each_change_to_another_policy_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, correction: dict[str, Any] | None
) -> None:
    logprobs = [OWN, OWN, RENORMALISED, RENORMALISED, OWN, RENORMALISED]
    records = good_records(12)
    for number, record in enumerate(records):
        value = logprobs[number // 2]
        record["old_logprobs"] = [[value] * len(response) for response in record["responses"]]
    values = run_values(
        tmp_path / "out",
        records=write_records(tmp_path / "records.jsonl", records),
        training={"steps": 6, "optimizer_steps_per_rollout": 2},
        objective={} if correction is None else {"correction": correction},
        output={"save_last": False},
    )
    with caplog.at_level(logging.WARNING, "megatron_prefix"), trainer(values) as run:
        run.run()
    said = [r.getMessage() for r in caplog.records if "not those of the policy" in r.getMessage()]
    assert [line.split(":")[0] for line in said] == ["step 3", "step 6"]
    assert all("older weights" in line and "after top_p" in line for line in said)
    assert all(("objective.correction" in line) == (correction is None) for line in said)
