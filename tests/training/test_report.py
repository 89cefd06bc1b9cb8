"""What a run tells the person who started it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_prefix.config import RunConfig
from megatron_prefix.config.loader import load_dataclass, load_yaml
from megatron_prefix.training.report import count_parameters
from tests.distributed import run_distributed
from tests.training.runs import (
    PIPELINE,
    TENSOR,
    good_records,
    run_command,
    run_values,
    torchrun,
    trainer,
    write_config,
    write_records,
)


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    records = write_records(tmp_path / "rollouts.jsonl", [*good_records(12), "", " "])
    return run_values(
        tmp_path / "out",
        records=records,
        training={"steps": 6},
        output={"tensorboard": True, "plot": True},
    )


def test_a_good_run_under_torchrun_says_what_it_does_in_at_most_25_lines(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    done = torchrun(write_config(tmp_path / "run.yaml", values), ignore_warnings=False)
    assert done.returncode == 0, done.stderr
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    assert len(lines) <= 25, done.stderr
    assert not [line for line in lines if re.search(r"Warning|DEPRECATED|deprecated", line)]
    text = "\n".join(lines)
    out = tmp_path / "out"
    for expected in (
        r"^model: [\d,]+ parameters in float32, random weights$",
        r"^layout: 2 processes = tensor 1 x pipeline 1 x context 1 x data 2, on cpu$",
        rf"^rollouts: engine file, 12 records in {tmp_path}/rollouts.jsonl, 2 groups a step$",
        r"^steps: 6 to do of 6, 1 optimizer step each$",
        rf"^output: {out}$",
        rf"^saved: {out}/checkpoints/step_000006$",
        r"^done: 6 of 6 steps; raise training.steps to train on, or take the model out: ",
    ):
        assert re.search(expected, text, re.MULTILINE), expected
    steps = [line for line in lines if line.startswith("step ")]
    number = r"[-+.,e\d]+"
    for step, line in enumerate(steps, start=1):
        assert re.fullmatch(
            rf"step {step}/6  reward {number}  grad_norm {number}  lr 0\.001  tokens/s {number}",
            line,
        ), line
    assert len(steps) == 6


def test_a_run_that_goes_on_under_torchrun_shows_no_warnings_of_megatron_or_torch(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    for steps in (1, 7):
        values["training"]["steps"] = steps
        done = torchrun(write_config(tmp_path / "run.yaml", values), ignore_warnings=False)
        assert done.returncode == 0, done.stderr
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    assert len(lines) <= 25, done.stderr
    assert not [line for line in lines if re.search(r"Warning|DEPRECATED|deprecated", line)]


def _runs(rank: int, world_size: int, configs: list[Path]) -> list[tuple[int, str]]:
    return [run_command(config) for config in configs]


def test_a_run_that_goes_on_says_from_where_and_a_finished_one_what_to_do(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    first = {**values, "training": {**values["training"], "steps": 2}}
    # Where the run began, and needed no more.
    gone = {"output": {**values["output"], "load": str(tmp_path / "gone")}}
    configs = [
        write_config(tmp_path / "first.yaml", first),
        write_config(tmp_path / "again.yaml", first),
        write_config(tmp_path / "longer.yaml", {**values, "optimizer": {"lr": 1e-3}, **gone}),
    ]
    ((begun, again, longer),) = run_distributed(_runs, 1, configs)
    assert "random weights" in begun[1]
    assert "steps: 0 to do of 2" in again[1]
    assert "done: all 2 steps were done before; raise training.steps to train on" in again[1]
    checkpoint = tmp_path / "out" / "checkpoints" / "step_000002"
    unused = f"output.load: {tmp_path / 'gone'} is not used"
    assert f"resumed after step 2 ({checkpoint}), {unused}\n" in longer[1]
    assert f"resumed after step 2 ({checkpoint})\n" in again[1]
    assert "steps: 4 to do of 6" in longer[1] and "step 3/6" in longer[1]
    assert [status for status, _ in (begun, again, longer)] == [0, 0, 0]


def test_a_run_that_starts_from_weights_names_them_and_one_that_runs_out_says_so(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    first = {**values, "training": {**values["training"], "steps": 1}}
    other = {
        **values,
        "output": {**values["output"], "directory": str(tmp_path / "b"), "save_last": False}
        | {"load": str(tmp_path / "out")},
        "rollouts": {**values["rollouts"], "epochs": 1, "groups_per_step": 5},
    }
    configs = [
        write_config(tmp_path / "first.yaml", first),
        write_config(tmp_path / "other.yaml", other),
    ]
    ((_, (status, text)),) = run_distributed(_runs, 1, configs)
    assert status == 0
    assert f"weights of {tmp_path / 'out'}" in text
    assert "saved: no checkpoint of these steps" in text
    assert "ended after step 2 of 6: the rollouts have ended" in text


def test_the_effective_configuration_is_beside_the_metrics_and_starts_the_same_run(
    tmp_path: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY_OF_MINE", "do-not-write-me")
    ((status, _),) = run_distributed(_command, 1, write_config(tmp_path / "run.yaml", values))
    assert status == 0
    written = tmp_path / "out" / "config.yaml"
    assert load_yaml(written, RunConfig) == load_dataclass(RunConfig, values)
    assert "do-not-write-me" not in written.read_text()
    assert "adam_beta2: 0.95" in written.read_text()


def _command(rank: int, world_size: int, config: Path) -> tuple[int, str]:
    return run_command(config)


def _counts(rank: int, world_size: int, values: dict[str, Any]) -> tuple[int, int]:
    with trainer(values) as run:
        return count_parameters(run.chunks), sum(
            parameter.numel() for _, parameter in run.chunks.named_parameters()
        )


@pytest.mark.parametrize("layout", [TENSOR, PIPELINE], ids=["tensor", "pipeline"])
def test_parameters_are_counted_once_in_every_layout(
    values: dict[str, Any], layout: dict[str, int]
) -> None:
    ((counted, whole),) = run_distributed(_counts, 1, values)
    assert counted == whole
    for counted, part in run_distributed(_counts, 2, {**values, "parallel": layout}):
        assert counted == whole > part


def test_a_run_that_cannot_go_on_as_it_is_told_says_what_to_do(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    model = values["model"]
    wider = {**model, "transformer": {**model["transformer"], "hidden_size": 64}}
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    output = {**values["output"], "directory": str(tmp_path / "other"), "load": str(folder)}
    first = {**values, "training": {**values["training"], "steps": 1}}
    changes = [{}, {"model": wider}, {"objective": {"kl_coefficient": 0.1}}, {"output": output}]
    configs = [
        write_config(tmp_path / f"{index}.yaml", {**first, **change})
        for index, change in enumerate(changes)
    ]
    (((status, _), *refused),) = run_distributed(_runs, 1, configs)
    assert status == 0
    for (status, text), expected, message in zip(
        refused,
        (1, 1, 2),  # 2: it is seen before anything is imported
        (
            "Set the model section as it was, or begin anew: in another output.directory, or with "
            "output.resume: false",
            "objective.kl_coefficient: 0.1, but the run in .* began with 0 .*; set it to 0, or",
            f"{folder}: a Hugging Face model, not a Megatron distributed checkpoint; make one of "
            f"it: tools/convert_checkpoint.py hf-to-megatron {folder} OUTPUT",
        ),
        strict=True,
    ):
        (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert status == expected and re.search(message, line), line
