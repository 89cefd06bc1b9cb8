"""Weights & Biases and MLflow, by their own packages, without a server."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from megatron_prefix.config import RunConfig
from megatron_prefix.config.loader import ConfigError, load_dataclass
from megatron_prefix.packages import MissingPackageError
from megatron_prefix.training.requirements import missing_packages
from megatron_prefix.training.trackers import MlflowRun, Trackers, WandbRun
from tests.training.runs import good_records, run_values, trainer, write_records

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("WANDB_SILENT", "true")
    # Nobody is told that they were used, or of their errors.
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("DO_NOT_TRACK", "true")
    # MLflow's store in files needs no package for databases, and has to be asked for.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    records = write_records(tmp_path / "rollouts.jsonl", good_records(4))
    return run_values(tmp_path / "out", records=records, training={"steps": 2})


def _train(values: dict[str, Any], steps: int) -> None:
    values["training"]["steps"] = steps
    with trainer(values) as run:
        run.run()


def _run_of_mlflow(uri: str) -> tuple[MlflowClient, Run]:
    """The only run of its experiment, and what reads more of it."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tests")
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def test_mlflow_gets_every_step_once_the_settings_and_samples_over_a_restart_too(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    uri = (tmp_path / "mlflow").as_uri()
    values["output"]["mlflow"] = {"experiment": "tests", "tracking_uri": uri}
    _train(values, 2)
    _train(values, 3)
    client, run = _run_of_mlflow(uri)
    assert (run.info.run_name, run.info.status) == ("out", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "reward")
    assert sorted((metric.step, metric.value) for metric in history) == [
        (1, 0.4375),
        (2, 0.4375),
        (3, 0.4375),
    ]
    assert run.data.params["optimizer.lr"] == "0.001"
    assert run.data.params["training.token_budget"] == "64"
    (folder,) = client.list_artifacts(run.info.run_id, "samples/training")
    assert folder.path == "samples/training/step_000001.md"
    known = json.loads((tmp_path / "out" / "trackers.json").read_text())
    assert known == {"output.mlflow": run.info.run_id}


def test_mlflow_takes_the_score_of_a_data_set_beside_that_of_all(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    uri = (tmp_path / "mlflow").as_uri()
    values["output"]["mlflow"] = {"experiment": "tests", "tracking_uri": uri}
    (tmp_path / "out").mkdir()
    trackers = Trackers(load_dataclass(RunConfig, values), continues=False)
    trackers.metrics(1, {"eval": 0.5, "eval/easy, or not": 0.25, "kl": float("nan")})
    trackers.close(failed=False)
    _, run = _run_of_mlflow(uri)
    assert run.data.metrics == {"eval": 0.5, "eval.easy_ or not": 0.25}


def test_wandb_writes_a_run_that_can_be_sent_later_and_goes_on_with_its_id(
    tmp_path: Path, values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    values["output"]["wandb"] = {"project": "tests", "mode": "offline"}
    _train(values, 2)
    known = json.loads((tmp_path / "out" / "trackers.json").read_text())["output.wandb"]
    _train(values, 3)
    files = sorted((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{known}.wandb"] * 2
    said = capsys.readouterr().err.splitlines()
    said = [line for line in said if line.startswith(("wandb", "output.wandb"))]
    assert said == [f"output.wandb: {file.parent}" for file in files]
    for file in files:
        content = file.read_bytes()
        for text in (b"grad_norm", b"reward", b"token_budget", b"tests"):
            assert text in content, text
    assert b"samples/training" in files[0].read_bytes()


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(
    tmp_path: Path,
    values: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    uri = (tmp_path / "mlflow").as_uri()
    values["output"]["mlflow"] = {"experiment": "tests", "tracking_uri": uri}

    def lost(self: MlflowRun, step: int, values: Any) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(MlflowRun, "metrics", lost)
    with caplog.at_level(logging.WARNING, "megatron_prefix"):
        _train(values, 2)
    said = [r.getMessage() for r in caplog.records if "output.mlflow" in r.getMessage()]
    assert said == [
        "output.mlflow: ConnectionError: the server is gone; it gets nothing more, the run goes on"
    ]


def test_a_run_that_fails_is_shown_as_failed(tmp_path: Path, values: dict[str, Any]) -> None:
    records = good_records(4)
    records[3]["responses"][1] = [1] * 60
    write_records(tmp_path / "rollouts.jsonl", records)
    uri = (tmp_path / "mlflow").as_uri()
    values["output"]["mlflow"] = {"experiment": "tests", "tracking_uri": uri}
    values["rollouts"]["check_records"] = 0  # or it would be found before the run begins
    with pytest.raises(ValueError, match=r"rollouts\.jsonl:4: responses\[1\]"):
        _train(values, 2)
    client, run = _run_of_mlflow(uri)
    assert run.info.status == "FAILED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "reward")] == [1]


def test_a_run_that_cannot_be_started_is_refused_by_its_option(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    values["output"]["mlflow"] = {"experiment": "tests", "tracking_uri": "nowhere://x"}
    with pytest.raises(ValueError, match=r"^output\.mlflow: its run could not be started: "):
        Trackers(load_dataclass(RunConfig, values), continues=False)


@pytest.mark.parametrize(
    ("option", "section", "fault"),
    [
        ("wandb", {"project": ""}, "output.wandb.project: is empty; name a project"),
        ("mlflow", {"experiment": ""}, "output.mlflow.experiment: is empty; name an experiment"),
        (
            "mlflow",
            {"experiment": "e", "tracking_uri": "https://me:secret@host"},
            "output.mlflow.tracking_uri: holds a password, which files of the run would show; ",
        ),
    ],
)
def test_what_a_tracker_cannot_take_is_refused(
    values: dict[str, Any], option: str, section: dict[str, str], fault: str
) -> None:
    values["output"][option] = section
    with pytest.raises(ConfigError) as caught:
        load_dataclass(RunConfig, values)
    (found,) = caught.value.faults
    assert found.startswith(fault) and "secret" not in found


@pytest.mark.parametrize(
    ("option", "section", "run"),
    [
        ("wandb", {"project": "p", "mode": "offline"}, WandbRun),
        ("mlflow", {"experiment": "e"}, MlflowRun),
    ],
)
def test_a_missing_package_is_named_before_the_run_and_where_it_is_imported(
    values: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    section: dict[str, str],
    run: type,
) -> None:
    monkeypatch.setitem(sys.modules, option, None)
    values["output"] |= {"save_last": False, option: section}
    config = load_dataclass(RunConfig, values)
    line = f"output.{option} needs {option}, which is not installed; pip install 'megatron-prefix"
    (said,) = missing_packages(config)
    assert said == f"{line}[{option}]'"
    with pytest.raises(MissingPackageError) as caught:
        Trackers(config, continues=False)
    assert str(caught.value) == said
