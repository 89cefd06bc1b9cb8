"""Whole runs of the trainer: what they learn, report and leave behind, and how they continue."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_prefix.distributed.rank_results import raise_together
from megatron_prefix.model.full_tensors import FullTensors, full_parameters
from megatron_prefix.objective import PolicyMetrics
from megatron_prefix.training import update as update_module
from megatron_prefix.training.metrics import MetricsLog
from megatron_prefix.training.minibatch import build_minibatch
from megatron_prefix.training.step import compute_logprobs, reduce_sums
from tests.distributed import run_distributed
from tests.megatron.models import relative_error
from tests.training.runs import (
    CONTEXT,
    DATA,
    PIPELINE,
    TENSOR,
    good_records,
    read_rows,
    run_values,
    torchrun,
    trainer,
    without_times,
    write_config,
    write_records,
)

PROMISED = {
    "step",
    "reward",
    "kl",
    "entropy",
    "clip_fraction",
    "grad_norm",
    "lr",
    "tokens_per_second",
    "tokens_computed",
    "tokens_ungrouped",
    "flops_saved_fraction",
}

Run = tuple[FullTensors | None, dict[str, Any]]


def _train(values: dict[str, Any]) -> Run:
    """A run from its first step to its last: whole parameters (on rank 0) and last metrics."""
    with trainer(values) as run:
        metrics = run.run()
        return full_parameters(run.chunks), metrics


def _assert_identical(found: FullTensors, expected: FullTensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def _assert_close(found: FullTensors, expected: FullTensors, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative_error(found[name], tensor) <= tolerance, name


def _without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [without_times(row) for row in rows]


def test_a_run_learns_and_leaves_metrics_tensorboard_a_picture_and_a_checkpoint(
    tmp_path: Path,
) -> None:
    records = write_records(tmp_path / "rollouts.jsonl", good_records(2))
    values = run_values(
        tmp_path / "out",
        records=records,
        objective={"name": "supervised", "report_entropy": True},
        training={"steps": 12},
        optimizer={"lr": 1e-2, "lr_warmup_steps": 3},
        output={"tensorboard": True, "plot": True},
    )
    done = torchrun(write_config(tmp_path / "run.yaml", values))
    assert done.returncode == 0, done.stderr
    assert "12/12" in done.stderr  # the progress bar

    rows = read_rows(tmp_path / "out")
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        assert row.keys() >= PROMISED
        assert all(isinstance(value, (int, float)) for value in row.values())
        # Two groups of 4 responses: the same prompts once instead of four times.
        assert row["tokens_computed"] < row["tokens_ungrouped"]
        assert 0 < row["flops_saved_fraction"] < 1
        assert row["reward"] == 0.4375
        assert row["grad_norm"] > 0 and row["entropy"] > 0 and row["tokens_per_second"] > 0
    assert rows[-1]["policy_loss"] < 0.9 * rows[0]["policy_loss"]
    assert [row["lr"] for row in rows] == pytest.approx([1e-2 / 3, 2e-2 / 3, *10 * [1e-2]])
    assert rows[1]["policy_loss"] < rows[0]["policy_loss"] - 0.01  # the first step of the warm-up

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= PROMISED - {"step"}
    scalars = events.Scalars("policy_loss")
    assert [event.step for event in scalars] == list(range(1, 13))
    assert scalars[-1].value == pytest.approx(rows[-1]["policy_loss"])

    import matplotlib.image

    height, width, _ = matplotlib.image.imread(tmp_path / "out" / "reward.png").shape
    assert (height, width) == (600, 1050)
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step_000012"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    records = good_records(5)
    write_records(folder / "five.jsonl", records)
    write_records(folder / "four.jsonl", records[:4])
    write_records(folder / "two.jsonl", records[:2])
    known = [{**r, "old_logprobs": [[-4.0] * len(x) for x in r["responses"]]} for r in records]
    write_records(folder / "known.jsonl", known)
    write_records(folder / "mixed.jsonl", [known[0], records[1]])
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """What rank 0 of two found in every scenario; starting processes is what takes the time."""
    return run_distributed(_run_scenarios, 2, folder, timeout=400)[0]


def _run_scenarios(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    return {
        scenario.__name__: scenario(folder)
        for scenario in (
            _learn,
            _resume,
            _fall_back,
            _start_anew,
            _use_old_logprobs,
            _mix_old_logprobs,
            _lay_out_differently,
            _try_objectives,
            _lose_the_gradient,
            _fail_on_rank_one,
        )
    }


def _learn(folder: Path) -> list[float]:
    """Sum of advantage * log-probability over the rollouts, before and after the run."""
    values = run_values(
        folder / "learn",
        records=folder / "two.jsonl",
        parallel=PIPELINE,
        training={"steps": 10},
        output={"save_last": False},
    )
    totals = []
    with trainer(values) as run:
        rollouts = [run.engine.next_rollouts(2, step=0)]
        dist.broadcast_object_list(rollouts)

        def measure() -> None:
            minibatch = build_minibatch(
                rollouts[0],
                run.config.objective,
                run.update.packing,
                attention=run.update.attention,
                data_parallel_rank=run.runtime.data_parallel_rank,
            )
            found = compute_logprobs(run.chunks, minibatch.batches, run.config.objective)
            total = torch.zeros(1, dtype=torch.float64)
            for batch, logprobs in zip(minibatch.batches, found, strict=False):
                total += (batch.weights * batch.advantages * logprobs).sum()
            totals.append(float(reduce_sums(total, contributes=run.runtime.reports_metrics)))

        measure()
        run.run()
        measure()
    return totals


def test_grpo_makes_the_better_responses_of_a_group_more_likely(found: dict[str, Any]) -> None:
    before, after = found["_learn"]
    assert after > before + 0.1


def _resume(folder: Path) -> tuple[Run, Run]:
    def values(name: str, steps: int) -> dict[str, Any]:
        # Several optimizer steps, so that old log-probabilities take part; 5 groups, so that a
        # rollout batch reaches over the end of an epoch.
        return run_values(
            folder / name,
            records=folder / "five.jsonl",
            training={"steps": steps, "optimizer_steps_per_rollout": 2, "epochs_per_rollout": 2},
            objective={"kl_coefficient": 0.3, "entropy_coefficient": 0.01},
            optimizer={"lr": 1e-3, "lr_decay_style": "cosine", "lr_decay_steps": 16},
        )

    whole = _train(values("whole", 4))
    _train(values("parts", 2))
    return whole, _train(values("parts", 4))


def test_a_resumed_run_continues_bit_for_bit_against_the_first_reference(
    folder: Path, found: dict[str, Any]
) -> None:
    (expected, last), (parameters, resumed) = found["_resume"]
    _assert_identical(parameters, expected)
    assert _without_times([resumed]) == _without_times([last])
    rows = read_rows(folder / "parts")
    assert _without_times(rows) == _without_times(read_rows(folder / "whole"))
    # Equal to the undisturbed run's, whose reference is the start: a reference taken anew at the
    # resume would have shown here.
    assert all(row["kl"] > 1e-6 for row in rows)


def _fall_back(folder: Path) -> tuple[Run, list[str], list[dict[str, Any]], Run]:
    """A run, its checkpoints and metrics, and the same run again without the newest ones."""
    values = run_values(
        folder / "fall_back",
        records=folder / "five.jsonl",
        training={"steps": 4},
        output={"save_every": 1, "keep": 3},
    )
    whole = _train(values)
    rows = read_rows(folder / "fall_back")
    checkpoints = folder / "fall_back" / "checkpoints"
    names = sorted(path.name for path in checkpoints.iterdir())
    dist.barrier()
    if dist.get_rank() == 0:
        for step in (3, 4):
            shutil.rmtree(checkpoints / f"step_00000{step}")
        with (folder / "fall_back" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "rew')  # cut off by a kill
    dist.barrier()
    return whole, names, rows, _train(values)


def test_a_run_that_falls_back_to_an_older_checkpoint_has_no_step_twice(
    folder: Path, found: dict[str, Any]
) -> None:
    (expected, _), names, rows, (parameters, _) = found["_fall_back"]
    assert names == ["step_000002", "step_000003", "step_000004"]
    _assert_identical(parameters, expected)
    assert _without_times(read_rows(folder / "fall_back")) == _without_times(rows)


def _start_anew(folder: Path) -> list[Run]:
    """A run of 3 steps; one of 1 step that does not resume; and its continuation to step 2."""
    base = run_values(folder / "anew", records=folder / "five.jsonl", training={"steps": 3})
    anew = {**base["output"], "resume": False, "keep": 1}
    return [
        _train(base),
        _train({**base, "training": {**base["training"], "steps": 1}, "output": anew}),
        _train({**base, "training": {**base["training"], "steps": 2}}),
    ]


def test_a_run_that_starts_anew_does_not_mix_with_what_is_there(
    folder: Path, found: dict[str, Any]
) -> None:
    _, (one, _), (two, _) = found["_start_anew"]
    assert [row["step"] for row in read_rows(folder / "anew")] == [1, 2]
    assert not torch.equal(one["output_layer.weight"], two["output_layer.weight"])
    left = {path.name: sorted(p.name for p in path.iterdir()) for path in folder.glob("anew/ch*")}
    assert left == {
        "checkpoints": ["step_000001", "step_000002"],
        "checkpoints.1": ["step_000003"],
    }


def test_a_run_that_ended_before_its_first_checkpoint_evaluates_its_start_once(
    tmp_path: Path,
) -> None:
    for score in (0.25, 0.5):
        log = MetricsLog(tmp_path, resume_after=0, tensorboard=False)
        log.write(0, {"eval": score})
        log.close()
    assert read_rows(tmp_path) == [{"step": 0, "eval": 0.5}]


def _use_old_logprobs(folder: Path) -> list[tuple[dict[str, Any], int, list[float]]]:
    """Per run: metrics, passes for log-probabilities, and the ratio of each optimizer step."""
    several = {"steps": 1, "optimizer_steps_per_rollout": 2, "epochs_per_rollout": 2}
    return [
        _watch(
            run_values(
                folder / f"old_{name}_{training['steps']}_{len(training)}",
                records=folder / f"{name}.jsonl",
                parallel=TENSOR,
                training=training,
                optimizer={"lr": 1e-2},
                rollouts={"groups_per_step": 4},
                output={"save_last": False},
            )
        )
        for name, training in (("four", several), ("four", {"steps": 1}), ("known", several))
    ]


def _watch(values: dict[str, Any]) -> tuple[dict[str, Any], int, list[float]]:
    ratios: list[float] = []
    original = update_module.train_step

    def record(*args: Any) -> Any:
        result = original(*args)
        total = sum(result.metrics, start=PolicyMetrics.zeros())
        ratios.append(float(total.ratio / total.tokens))
        return result

    spy = mock.Mock(side_effect=compute_logprobs)
    with (
        mock.patch.object(update_module, "train_step", record),
        mock.patch.object(update_module, "compute_logprobs", spy),
        trainer(values) as run,
    ):
        return run.run(), spy.call_count, ratios


def test_old_logprobs_are_computed_once_per_rollout_batch_and_only_where_needed(
    found: dict[str, Any],
) -> None:
    several, single, known = found["_use_old_logprobs"]
    metrics, passes, ratios = several
    assert passes == 2  # one per optimizer step's share of the batch, none again in epoch 2
    assert len(ratios) == 4 and metrics["tokens"] == 2 * 4 * 14
    # The first step sees the very weights that the old log-probabilities are from.
    assert ratios[0] == 1.0
    assert all(abs(ratio - 1.0) > 1e-4 for ratio in ratios[1:])
    # Both halves of the batch have as many tokens.
    assert metrics["ratio_mean"] == pytest.approx(sum(ratios) / 4)

    metrics, passes, ratios = single
    assert passes == 0 and ratios == [1.0]
    assert metrics["ratio_mean"] == 1.0 and metrics["ratio_std"] == 0.0
    assert metrics["clip_fraction"] == 0.0 and metrics["old_kl"] == 0.0

    metrics, passes, ratios = known
    assert passes == 0 and abs(ratios[0] - 1.0) > 1e-2


def _error(values: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as error, trainer(values) as run:
        run.run()
    return str(error.value)


def _mix_old_logprobs(folder: Path) -> str:
    return _error(run_values(folder / "mixed", records=folder / "mixed.jsonl"))


def test_groups_with_and_without_old_logprobs_do_not_share_an_optimizer_step(
    folder: Path, found: dict[str, Any]
) -> None:
    path = folder / "mixed.jsonl"
    assert found["_mix_old_logprobs"].startswith(
        f"{path}:2: old_logprobs: missing, but {path}:1, of the same rollout batch, has them"
    )


def _lose_the_gradient(folder: Path) -> str:
    """A learning rate that makes weights, and so the next gradient, overflow."""
    values = run_values(
        folder / "lost",
        records=folder / "five.jsonl",
        training={"steps": 6},
        optimizer={"lr": 1e30, "clip_grad": 0.0},
        output={"save_every": 1},
    )
    return _error(values)


def test_a_gradient_that_is_not_finite_ends_the_run_before_anything_is_saved(
    folder: Path, found: dict[str, Any]
) -> None:
    step = re.match(r"step (\d): the gradient's norm is (nan|inf)", found["_lose_the_gradient"])
    assert step is not None, found["_lose_the_gradient"]
    rows = read_rows(folder / "lost")
    assert [row["step"] for row in rows] == list(range(1, int(step[1])))
    assert all(row["grad_norm"] > 0 for row in rows)
    saved = sorted(path.name for path in (folder / "lost" / "checkpoints").iterdir())
    assert saved[-1] == f"step_00000{len(rows)}"


# Adam turns a gradient of pure rounding into a whole step, unless epsilon is above it.
EXACT = {"lr": 1e-2, "adam_eps": 1e-4}


def _lay_out_differently(folder: Path) -> tuple[Run, dict[tuple[str, int], Run]]:
    """The same two steps at other layouts and token budgets, from the same weights."""

    def values(name: str, budget: int, parallel: dict[str, int]) -> dict[str, Any]:
        return run_values(
            folder / f"{name}_{budget}",
            records=folder / "four.jsonl",
            parallel=parallel,
            training={"token_budget": budget, "dtype": "float64"},
            objective={"kl_coefficient": 0.1, "entropy_coefficient": 0.01},
            optimizer=EXACT,
            rollouts={"groups_per_step": 4},
            output={"save_last": False},
        )

    first = _train(values("data", 256, DATA))
    # The reference is the weights of that run's start.
    start = {"load": str(folder / "data_256" / "checkpoints" / "reference")}
    others = {}
    for name, budget, parallel in (
        ("data", 48, DATA),
        ("data", 16, DATA),
        ("tensor", 256, TENSOR),
        ("tensor", 16, TENSOR),
        ("pipeline", 256, PIPELINE),
        ("pipeline", 48, PIPELINE),
        ("context", 256, CONTEXT),
        ("context", 48, CONTEXT),
    ):
        changed = values(name, budget, parallel)
        changed["output"].update(start)
        others[name, budget] = _train(changed)
    return first, others


def test_a_step_does_not_depend_on_budget_microbatches_splits_or_ranks(
    found: dict[str, Any],
) -> None:
    (expected, reference), others = found["_lay_out_differently"]
    for (name, budget), (parameters, metrics) in others.items():
        _assert_close(parameters, expected, 1e-12)
        for key in ("policy_loss", "kl", "entropy", "grad_norm", "reward", "tokens_ungrouped"):
            expectation = pytest.approx(reference[key], rel=1e-10, abs=1e-12)
            assert metrics[key] == expectation, (name, budget, key)
        # No group fits into 16 tokens; one that is split runs its prompt again.
        if budget == 16:
            assert metrics["tokens_computed"] > reference["tokens_computed"] + 20


OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": {"kl_coefficient": 0.1},
    "dr_grpo": {"max_response_length": 8},
    "dapo": {"entropy_coefficient": 0.01},
    "gspo": {"clip_low": 0.1, "clip_high": 0.1},
    "cispo": {},
    "supervised": {},
}


def _try_objectives(folder: Path) -> list[dict[str, Run]]:
    """Each objective over two data-parallel ranks, and over two pipeline stages."""
    found = []
    for name, parallel in (("data", DATA), ("pipeline", PIPELINE)):
        runs = {}
        for objective, options in OBJECTIVES.items():
            values = run_values(
                folder / f"{objective}_{name}",
                records=folder / "four.jsonl",
                parallel=parallel,
                training={
                    "steps": 1,
                    "dtype": "float64",
                    "token_budget": 48,
                    "epochs_per_rollout": 2,
                },
                objective={"name": objective, **options},
                optimizer=EXACT,
                rollouts={"groups_per_step": 4},
                output={
                    "load": str(folder / "data_256" / "checkpoints" / "reference"),
                    "save_last": False,
                },
            )
            runs[objective] = _train(values)
        found.append(runs)
    return found


def test_every_objective_trains_the_same_over_two_pipeline_stages(found: dict[str, Any]) -> None:
    data, pipeline = found["_try_objectives"]
    for name in OBJECTIVES:
        _assert_close(pipeline[name][0], data[name][0], 1e-12)
    # Each objective leaves weights of its own.
    key = "decoder.layers.mlp.linear_fc2.weight"
    for a, b in itertools.combinations(OBJECTIVES, 2):
        assert relative_error(data[a][0][key], data[b][0][key]) > 1e-9, (a, b)


def _fail_on_rank_one(folder: Path) -> list[str | None]:
    """What each rank raised, when rank 1 alone met an error."""
    message = ""
    try:
        with raise_together():
            if dist.get_rank() == 1:
                raise ValueError("rollouts.jsonl:3: rewards[0]: wrong")
    except ValueError as error:
        message = str(error)
    messages: list[str | None] = [None, None]
    dist.all_gather_object(messages, message)
    return messages


def test_an_error_of_one_rank_reaches_all_of_them(found: dict[str, Any]) -> None:
    assert found["_fail_on_rank_one"] == 2 * ["rank 1 of 2: rollouts.jsonl:3: rewards[0]: wrong"]
