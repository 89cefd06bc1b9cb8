"""Runs over batches of which something is left out, masked or corrected, on real models."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prefix.model.full_tensors import FullTensors, full_parameters
from tests.distributed import run_distributed
from tests.megatron.models import relative_error
from tests.training.runs import good_records, read_rows, run_values, trainer, write_records

# A step of Adam turns a gradient of pure rounding into a whole step, unless epsilon is above it.
EXACT = {"lr": 1e-2, "adam_eps": 1e-4}


def _train(values: dict[str, Any]) -> FullTensors | None:
    with trainer(values) as run:
        run.run()
        return full_parameters(run.chunks)


def _dull_records(teaching: list[bool]) -> list[dict[str, Any]]:
    """Groups of which some have equal rewards."""
    records = good_records(len(teaching))
    for record, teaches in zip(records, teaching, strict=True):
        if not teaches:
            record["rewards"] = [1.0] * 4
    return records


def _skip_and_keep(
    rank: int, world_size: int, folder: Path, budgets: tuple[int, ...]
) -> dict[tuple[int, str], FullTensors | None]:
    found = {}
    for budget in budgets:
        for kind in ("keep", "skip"):
            values = run_values(
                folder / f"{budget}_{kind}",
                records=folder / "records.jsonl",
                training={"steps": 3, "dtype": "float64", "token_budget": budget},
                objective={"zero_advantages": kind},
                optimizer=EXACT,
                rollouts={"groups_per_step": 4},
                output={"save_last": False},
            )
            found[budget, kind] = _train(values)
    return found


def test_skipping_what_has_no_gradient_leaves_the_same_weights(tmp_path: Path) -> None:
    """A step with two groups that teach, one with one, one with none."""
    teaching = [True, False, False, True] + [False, True, False, False] + [False] * 4
    write_records(tmp_path / "records.jsonl", _dull_records(teaching))
    # A budget of 24 tokens is one of a row for each group, 96 one of one row for all.
    (found,) = run_distributed(_skip_and_keep, 1, tmp_path, (24, 96))
    for name, expected in found[24, "keep"].items():
        assert torch.equal(found[24, "skip"][name], expected), name
        # Sums of a row of other length in another order.
        assert relative_error(found[96, "skip"][name], found[96, "keep"][name]) <= 1e-12, name
    for budget in (24, 96):
        kept, skipped = (read_rows(tmp_path / f"{budget}_{kind}") for kind in ("keep", "skip"))
        for one, other in zip(kept, skipped, strict=True):
            assert one["zero_advantage_fraction"] == other["zero_advantage_fraction"]
            assert one["skipped_fraction"] == 0
            assert other["policy_loss"] == pytest.approx(one["policy_loss"], abs=1e-12)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-12)
        assert [row["skipped_fraction"] for row in skipped] == [0.5, 0.75, 1.0]
        assert [row["zero_advantage_fraction"] for row in skipped] == [0.5, 0.75, 1.0]
        assert skipped[1]["tokens_computed"] < 0.5 * kept[1]["tokens_computed"]
        assert skipped[2]["grad_norm"] == 0 == skipped[2]["tokens"]


def test_two_ranks_skip_alike(tmp_path: Path) -> None:
    teaching = [True, False, True, True] * 2 + [False] * 4
    write_records(tmp_path / "records.jsonl", _dull_records(teaching))
    found = run_distributed(_skip_and_keep, 2, tmp_path, (48,))[0]
    for name, expected in found[48, "keep"].items():
        assert relative_error(found[48, "skip"][name], expected) <= 1e-12, name


def test_a_warning_says_when_three_batches_in_a_row_teach_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teaching = [False, True] + 4 * [False, False]
    records = write_records(tmp_path / "records.jsonl", _dull_records(teaching))
    values = run_values(
        tmp_path / "out", records=records, training={"steps": 5}, output={"save_last": False}
    )
    with caplog.at_level(logging.WARNING, "megatron_prefix"), trainer(values) as run:
        run.run()
    said = [r.getMessage() for r in caplog.records if "has an advantage" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("steps 2 to 4: no response has an advantage that trains the policy")
    assert "equal rewards" in said[0]


def _cut_off(record: dict[str, Any]) -> None:
    record |= {"finished": [False] * 4, "rewards": [0.0] * 4}


def _masked(record: dict[str, Any]) -> None:
    record["finished"] = [False] * 4


def _identical(record: dict[str, Any]) -> None:
    record |= {"responses": record["responses"][:1] * 4, "rewards": [1.0] * 4}


def _identical_by_a_fickle_reward(record: dict[str, Any]) -> None:
    record["responses"] = record["responses"][:1] * 4


def _alone(record: dict[str, Any]) -> None:
    record |= {"responses": record["responses"][:1], "rewards": [1.0]}


@pytest.mark.parametrize(
    ("change", "objective", "cause"),
    [
        (_cut_off, {}, "most responses are cut off at the limit of length"),
        (_masked, {"overlong": {"kind": "mask"}}, "most responses are cut off at the limit of"),
        (_identical, {}, "most responses repeat another one of their group"),
        (_identical_by_a_fickle_reward, {}, "most responses repeat another one of their group"),
        (_alone, {}, "each group is a single response, which nothing is compared with: raise "),
    ],
)
def test_the_third_batch_that_teaches_nothing_is_told_with_its_likely_cause(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[dict[str, Any]], None],
    objective: dict[str, Any],
    cause: str,
) -> None:
    records = good_records(6)
    for record in records:
        change(record)
    values = run_values(
        tmp_path / "out",
        records=write_records(tmp_path / "records.jsonl", records),
        training={"steps": 3},
        objective=objective,
        output={"save_last": False},
    )
    with caplog.at_level(logging.WARNING, "megatron_prefix"), trainer(values) as run:
        run.run()
    (said,) = [r.getMessage() for r in caplog.records if "has an advantage" in r.getMessage()]
    assert said.startswith("steps 1 to 3: no response has an advantage that trains the policy")
    assert cause in said
    for row in read_rows(tmp_path / "out"):
        assert row["grad_norm"] < 1e-6


def test_metrics_count_unfinished_repeated_and_masked_responses(tmp_path: Path) -> None:
    first, second = good_records(2)
    first["responses"] = [[5, 6], [5, 6], [5, 7], [5, 6]]
    first["finished"] = [True, False, True, True]
    second["finished"] = [True, True, False, False]
    records = write_records(tmp_path / "records.jsonl", [first, second])
    values = run_values(
        tmp_path / "out",
        records=records,
        training={"steps": 1},
        objective={"overlong": {"kind": "mask"}},
        output={"save_last": False},
    )
    _train(values)
    (row,) = read_rows(tmp_path / "out")
    assert (row["reward_min"], row["reward_max"]) == (0.0, 1.0)
    # Both groups have 1, 0, 0.5 and 0.25.
    assert row["reward_std"] == pytest.approx(np.std([1.0, 0.0, 0.5, 0.25]))
    assert row["reward_group_std"] == pytest.approx(row["reward_std"])
    assert row["repeated_fraction"] == 2 / 8
    assert row["unfinished_fraction"] == row["overlong_fraction"] == 3 / 8
    assert row["skipped_fraction"] == 3 / 8
    # Of the responses 2, 2, 2 and 3, 5 tokens that are trained on.
    assert row["tokens"] == 14


def test_samples_of_another_policy_are_corrected_and_impossible_values_are_counted(
    tmp_path: Path,
) -> None:
    """The trainer computes the old policy's; the records have those of the policy that sampled."""
    records = good_records(2)
    for record in records:
        record["old_logprobs"] = [[-4.0] * len(r) for r in record["responses"]]
    records[0]["old_logprobs"][1][2] = -9999.0
    path = write_records(tmp_path / "records.jsonl", records)
    values = run_values(
        tmp_path / "out",
        records=path,
        training={"steps": 1, "epochs_per_rollout": 2, "dtype": "float64"},
        objective={"correction": {"kind": "truncate", "level": "sequence", "high": 1.5}},
        output={"save_last": False},
    )
    _train(values)
    (row,) = read_rows(tmp_path / "out")
    assert all(math.isfinite(value) for value in row.values())
    # 14 tokens a group, twice.
    assert (row["tokens"], row["unknown_fraction"]) == (56, 1 / 28)
    # The ratio is to the trainer's own old policy: 1 in the first epoch, near it in the second.
    assert row["ratio_mean"] == pytest.approx(1, abs=0.1)
    # Sampled with exp(-4), while the random model gives about 1 / 64 = exp(-4.16).
    assert row["mismatch_p50"] == pytest.approx(math.exp(-0.16), rel=0.3)
    assert 0 < row["mismatch_kl"] < 0.5
    assert 0 < row["correction_mean"] <= 1.5


def test_a_correction_without_the_log_probabilities_of_the_samples_is_refused(
    tmp_path: Path,
) -> None:
    records = write_records(tmp_path / "records.jsonl", good_records(2))
    values = run_values(tmp_path / "out", records=records, objective={"correction": {}})
    with (
        trainer(values) as run,
        pytest.raises(ValueError, match=r"records.jsonl:1: old_logprobs: missing, and objective\."),
    ):
        run.run()


def test_several_rewards_are_trained_by_their_weighted_sum_and_reported_each(
    tmp_path: Path,
) -> None:
    named, plain = good_records(4), good_records(4)
    for record, expected in zip(named, plain, strict=True):
        brief = [0.0, 2.0, 1.0, 4.0]
        right = record["rewards"]
        record["rewards"] = {"right": right, "brief": brief, "odd": [7.0] * 4}
        expected["rewards"] = [1.0 * r - 0.25 * b for r, b in zip(right, brief, strict=True)]
    weights = {"right": 1.0, "brief": -0.25, "odd": 0.0}
    found = []
    for name, records, objective in (
        ("named", named, {"reward_weights": weights}),
        ("plain", plain, {}),
    ):
        values = run_values(
            tmp_path / name,
            records=write_records(tmp_path / f"{name}.jsonl", records),
            objective=objective,
            output={"save_last": False},
        )
        found.append(_train(values))
    for name, expected in found[1].items():
        assert torch.equal(found[0][name], expected), name
    for row, other in zip(
        *(read_rows(tmp_path / name) for name in ("named", "plain")), strict=True
    ):
        assert row["reward"] == other["reward"] == pytest.approx(0.4375 - 0.25 * 1.75)
        means = [row[f"reward/{name}"] for name in weights]
        assert means == pytest.approx([0.4375, 1.75, 7])


def test_functions_by_name_reward_what_a_run_samples_and_evaluates(tmp_path: Path) -> None:
    prompts = [{"prompt": [3, n], "answer": [5, 6, n]} for n in range(4)]
    path = write_records(tmp_path / "prompts.jsonl", prompts)
    weights = {"exact": 2.0, "close": 0.5}
    values = run_values(
        tmp_path / "out",
        records=path,
        training={"steps": 1},
        objective={"reward_weights": weights},
        rollouts={
            "engine": "embedded",
            "group_size": 8,
            "max_response_length": 3,
            "reward": {"exact": "exact_match", "close": "token_match_fraction"},
        },
        output={"save_last": False},
    )
    values["evaluation"] = {"paths": [str(path)], "num_prompts": 2, "temperature": 1.0}
    _train(values)
    before, row = read_rows(tmp_path / "out")
    assert 0 <= before["eval"] <= 2.5
    assert 0 < row["reward/close"] < 1
    total = sum(weight * row[f"reward/{name}"] for name, weight in weights.items())
    assert row["reward"] == pytest.approx(total)


def test_a_gradient_that_overflows_is_laid_to_the_most_extreme_record(tmp_path: Path) -> None:
    """A norm of 32 bits is a sum of squares: that of 1e20 is infinite."""
    records = good_records(4)
    for index, size in ((1, 1e3), (2, 1e20), (3, 1e4)):
        lengths = map(len, records[index]["responses"])
        records[index]["advantages"] = [
            [size if i == 1 else 0.5] * n for i, n in enumerate(lengths)
        ]
    path = write_records(tmp_path / "records.jsonl", records)
    values = run_values(
        tmp_path / "out", records=path, rollouts={"groups_per_step": 4}, output={"save_last": False}
    )
    message = (
        r"norm is inf, .* \(the advantage farthest from 0 is 1e\+20, in .*:3: responses\[1\]\)"
    )
    with trainer(values) as run, pytest.raises(ValueError, match=message):
        run.run()
