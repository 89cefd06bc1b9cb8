"""Which learning rate, schedule, weight decay and betas a run uses, at first and when resumed."""

from __future__ import annotations

import itertools
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_prefix.model.full_tensors import full_parameters
from tests.distributed import run_distributed
from tests.training.runs import good_records, read_rows, run_values, trainer, write_records

SHARDED = pytest.mark.parametrize(
    "sharded", [True, False], ids=["distributed optimizer", "whole optimizer"]
)

FIRST = {"lr": 1e-2, "lr_decay_style": "constant"}
CHANGED = {
    "lr": 1e-5,
    "min_lr": 1e-6,
    "lr_decay_style": "cosine",
    "lr_warmup_steps": 2,
    "weight_decay": 0.5,
    "adam_beta1": 0.8,
    "adam_beta2": 0.6,
    "adam_eps": 1e-7,
}
CHANGES = (
    "optimizer.lr 0.01 -> 1e-05, optimizer.min_lr 0.0 -> 1e-06, optimizer.lr_warmup_steps 0 -> 2, "
    "optimizer.lr_decay_steps 2 -> 4, optimizer.lr_decay_style constant -> cosine, "
    "optimizer.weight_decay 0.0 -> 0.5, optimizer.adam_beta1 0.9 -> 0.8, "
    "optimizer.adam_beta2 0.95 -> 0.6, optimizer.adam_eps 1e-08 -> 1e-07"
)


class _Lines(logging.Handler):
    """What the package logs at INFO or above."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _runs(
    rank: int, world_size: int, folder: Path, sharded: bool, phases: list[tuple[Any, ...]]
) -> list[dict[str, Any]]:
    """Runs in one folder, each the continuation of the one before it.

    Each is (steps, optimizer), or (steps, optimizer, other keys of training).
    """
    records = folder / "records.jsonl"
    logger, handler = logging.getLogger("megatron_prefix"), _Lines()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    found = []
    for steps, optimizer, *training in phases:
        values = run_values(
            folder / "out",
            records=records,
            objective={"name": "supervised"},
            training={"steps": steps, **dict(*training)},
            optimizer={"use_distributed_optimizer": sharded, **optimizer},
        )
        handler.lines.clear()
        with trainer(values) as run:
            said = [line for line in handler.lines if "optimizer." in line]
            started = [
                {name: group[name] for name in ("lr", "max_lr", "min_lr", "betas", "eps")}
                | {"decay": group["weight_decay"], "mult": group["wd_mult"]}
                for group in run.optimizer.param_groups
            ]
            start = full_parameters(run.chunks)
            run.run()
            saved = json.loads((run.checkpoints.path(run.step) / "trainer.json").read_text())
            found.append(
                {
                    "said": said,
                    "start": start,
                    "groups": started,
                    "saved": saved["config"]["optimizer"],
                    "parameters": full_parameters(run.chunks),
                    "rows": read_rows(folder / "out"),
                }
            )
        dist.barrier()  # rank 0 alone writes the metrics
    return found


def _train(
    folder: Path, phases: list[tuple[Any, ...]], *, sharded: bool = True, ranks: int = 1
) -> list[list[dict[str, Any]]]:
    write_records(folder / "records.jsonl", good_records(2))
    return run_distributed(_runs, ranks, folder, sharded, phases, timeout=240)


@SHARDED
def test_a_resumed_run_uses_the_optimizer_section_of_its_configuration(
    tmp_path: Path, sharded: bool
) -> None:
    ranks = _train(tmp_path, [(2, FIRST), (4, CHANGED)], sharded=sharded, ranks=2)
    for first, second in ranks:
        assert first["said"] == []
        assert {group["mult"] for group in second["groups"]} == {0.0, 1.0}
        for group in second["groups"]:
            assert (group["max_lr"], group["min_lr"]) == (1e-5, 1e-6)
            assert group["betas"] == (0.8, 0.6) and group["eps"] == 1e-7
            assert group["decay"] == 0.5 * group["mult"]
    first, second = ranks[0]
    assert [row["lr"] for row in second["rows"][:2]] == [1e-2, 1e-2]
    # Steps 3 and 4 of a cosine over 4 steps whose second step is the last of the warm-up: one and
    # two thirds of the way down.
    expected = [1e-6 + 9e-6 * (1 + math.cos(math.pi * x / 3)) / 2 for x in (1, 2)]
    assert [row["lr"] for row in second["rows"][2:]] == pytest.approx(expected, rel=1e-12)
    assert second["saved"] == first["saved"] | CHANGED
    (line,) = second["said"]
    assert CHANGES in line and "optimizer.on_resume: config" in line
    assert ranks[1][1]["said"] == []


@SHARDED
def test_a_resumed_run_keeps_the_settings_of_its_checkpoint_where_asked_to(
    tmp_path: Path, sharded: bool
) -> None:
    warmed = {**FIRST, "lr_warmup_steps": 2, "weight_decay": 0.25}
    kept = {**CHANGED, "lr_warmup_steps": 3, "on_resume": "checkpoint"}
    ((first, second),) = _train(tmp_path, [(2, warmed), (4, kept)], sharded=sharded)
    for group in second["groups"]:
        assert group["lr"] == group["max_lr"] == 1e-2 and group["min_lr"] == 0.0
        assert group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8
        assert group["decay"] == 0.25 * group["mult"]
    assert [row["lr"] for row in second["rows"]] == [5e-3, 1e-2, 1e-2, 1e-2]
    (line,) = second["said"]
    assert "optimizer.lr 1e-05 -> 0.01, " in line and "optimizer.on_resume: checkpoint" in line
    # The checkpoint says what was used, not what the file asked for.
    used = {"on_resume": "checkpoint", "lr_decay_steps": 2}
    assert second["saved"] == first["saved"] | used


def test_an_unchanged_or_longer_constant_run_has_nothing_to_say(tmp_path: Path) -> None:
    ((_, same, longer),) = _train(tmp_path, [(2, FIRST), (2, FIRST), (3, FIRST)])
    assert same["said"] == longer["said"] == []


def test_a_lengthened_cosine_goes_on_as_the_longer_one(tmp_path: Path) -> None:
    cosine = {"lr": 1e-2, "lr_decay_style": "cosine"}
    (tmp_path / "whole").mkdir()
    ((whole,),) = _train(tmp_path / "whole", [(6, cosine)])
    ((short, longer),) = _train(tmp_path, [(3, cosine), (6, cosine)])
    rates = [row["lr"] for row in whole["rows"]]
    assert rates == pytest.approx(
        [1e-2 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)], rel=1e-12
    )
    assert [row["lr"] for row in longer["rows"][3:]] == rates[3:]
    losses = [row["policy_loss"] for row in longer["rows"]]
    assert all(after < before - 0.01 for before, after in itertools.pairwise(losses))
    name = "output_layer.weight"
    assert not torch.equal(longer["parameters"][name], short["parameters"][name])
    (line,) = longer["said"]
    assert "optimizer.lr_decay_steps 3 -> 6" in line


def test_every_step_of_a_warm_up_changes_the_weights_at_the_rate_that_is_reported(
    tmp_path: Path,
) -> None:
    warm = {"lr": 1e-2, "lr_warmup_steps": 4, "lr_decay_style": "linear", "lr_decay_steps": 6}
    # Over a resume in the middle of the warm-up.
    ((_, second),) = _train(tmp_path, [(2, warm), (7, warm)])
    rates = [1 / 4, 2 / 4, 3 / 4, 1, 2 / 3, 1 / 3, 0]
    assert [row["lr"] for row in second["rows"]] == pytest.approx([1e-2 * r for r in rates])
    losses = [row["policy_loss"] for row in second["rows"]]
    assert losses[1] < losses[0] - 0.01
    assert second["said"] == []


def test_a_step_moves_the_weights_by_the_rate_that_it_reports(tmp_path: Path) -> None:
    # Adam's first step moves each weight that has a gradient by the learning rate.
    warm = {"lr": 1e-2, "lr_warmup_steps": 4, "lr_decay_steps": 4, "adam_eps": 1e-20}
    ((first,),) = _train(tmp_path, [(1, warm)])
    assert first["rows"][0]["lr"] == 2.5e-3
    name = "decoder.layers.mlp.linear_fc2.weight"
    moved = (first["parameters"][name] - first["start"][name]).abs()
    assert moved.max().item() == pytest.approx(2.5e-3, rel=1e-4)


@SHARDED
def test_an_optimizer_that_is_sharded_otherwise_is_refused_by_its_option(
    tmp_path: Path, sharded: bool
) -> None:
    _train(tmp_path, [(1, FIRST)], sharded=sharded)
    was, now = str(sharded).lower(), str(not sharded).lower()
    message = f"optimizer.use_distributed_optimizer: {now}, but .* was saved with {was}"
    with pytest.raises(Exception, match=message):
        _train(tmp_path, [(2, FIRST)], sharded=not sharded)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_schedule_over_the_whole_run_ends_with_it_whatever_a_step_takes(
    tmp_path: Path, before: int, after: int
) -> None:
    cosine = {"lr": 1e-2, "lr_decay_style": "cosine"}
    phases = [
        (2, cosine, {"optimizer_steps_per_rollout": before}),
        (4, cosine, {"optimizer_steps_per_rollout": after}),
    ]
    ((_, second),) = _train(tmp_path, phases)
    total = 2 * before + 2 * after
    # The rate of a rollout batch's last optimizer step, of the last two batches.
    taken = [2 * before + after - 1, total - 1]
    expected = [1e-2 * (1 + math.cos(math.pi * k / total)) / 2 for k in taken]
    assert [row["lr"] for row in second["rows"][2:]] == pytest.approx(expected, rel=1e-12)


def test_steps_behind_the_end_of_a_schedule_and_other_clipping_are_said(tmp_path: Path) -> None:
    cosine = {"lr": 1e-2, "min_lr": 1e-3, "lr_decay_style": "cosine", "lr_decay_steps": 2}
    ((_, second),) = _train(tmp_path, [(2, cosine), (3, {**cosine, "clip_grad": 0.5})])
    assert second["rows"][2]["lr"] == pytest.approx(1e-3)
    assert any("optimizer.clip_grad 1.0 -> 0.5" in line for line in second["said"])
    (ended,) = [line for line in second["said"] if line.startswith("optimizer.lr_decay_steps: ")]
    assert (
        "the schedule has ended after 2 optimizer steps; the 1 that follow run at min_lr" in ended
    )
