"""Weights & Biases and MLflow: what is written into a run's folder goes there as well.

A run that is started again goes on as the same run of theirs, by an id that its folder keeps. What
cannot be reached when the run starts ends it. What fails later is said once and gets nothing more:
the run's folder has everything.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_prefix.config import RunConfig, config_summary
from megatron_prefix.config.output import MlflowConfig
from megatron_prefix.packages import needed_by
from megatron_prefix.training.report import say
from megatron_prefix.training.samples import Sample, markdown

logger = logging.getLogger(__name__)

_IDS = "trackers.json"
"""In the run's folder: the ids of its runs."""
_NOT_IN_A_NAME = re.compile(r"[^\w\-. ]")
"""What no store of MLflow takes in a name, and `/`: a store in files makes folders of it, and has
no folder `eval` for `eval/easy` beside the metric `eval`."""
_LONGEST_PARAMETER = 500
"""Characters that MLflow takes of a value."""
_PARAMETERS_AT_ONCE = 100
"""That MLflow takes in one request."""


class Tracker(Protocol):
    """A service that keeps metrics."""

    id: str
    """By which its run can go on."""
    where: str
    """Its run, in words for whoever looks for it."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Take a step's metrics, all of them finite numbers."""
        ...

    def samples(self, step: int, kind: str, samples: Sequence[Sample]) -> None:
        """Take some responses."""
        ...

    def close(self, *, failed: bool) -> None:
        """Send what is left, and end the run as done or as failed."""
        ...


class Trackers:
    """All trackers of a run, by the option that asks for each."""

    def __init__(self, config: RunConfig, *, continues: bool) -> None:
        """Start their runs, or go on with them.

        Args:
            config: the run's.
            continues: whether steps were done before.

        Raises:
            ValueError: a package is not installed, or a run of it could not be started, naming the
                option.
        """
        output = config.output
        path = output.directory / _IDS
        known = json.loads(path.read_text(encoding="utf-8")) if continues and path.exists() else {}
        starts: dict[str, Callable[[RunConfig, str | None], Tracker]] = {}
        if output.wandb is not None:
            starts["output.wandb"] = WandbRun
        if output.mlflow is not None:
            starts["output.mlflow"] = MlflowRun
        self._trackers: dict[str, Tracker] = {}
        for option, start in starts.items():
            with needed_by(option, extra=option.rpartition(".")[2]):
                try:
                    self._trackers[option] = start(config, known.get(option))
                except ImportError:
                    raise
                # Each package has errors of its own.
                except Exception as error:
                    raise ValueError(f"{option}: its run could not be started: {error}") from error
        for option, tracker in self._trackers.items():
            say(f"{option}: {tracker.where}")
        if self._trackers:
            ids = {option: tracker.id for option, tracker in self._trackers.items()}
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps({**known, **ids}), encoding="utf-8")
            os.replace(temporary, path)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Give every tracker a step's numbers; those that are not finite are left out."""
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        }
        self._each(lambda tracker: tracker.metrics(step, numbers))

    def samples(self, step: int, kind: str, samples: Sequence[Sample]) -> None:
        """Give every tracker some responses."""
        self._each(lambda tracker: tracker.samples(step, kind, samples))

    def close(self, *, failed: bool) -> None:
        """End their runs as done or as failed."""
        self._each(lambda tracker: tracker.close(failed=failed))
        self._trackers.clear()

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for option, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            # Metrics that cannot be sent must not end a run, whatever the reason is.
            except Exception as error:
                logger.warning(
                    "%s: %s: %s; it gets nothing more, the run goes on",
                    *(option, type(error).__name__, error),
                )
                del self._trackers[option]


class WandbRun:
    """A run of Weights & Biases."""

    def __init__(self, config: RunConfig, known: str | None) -> None:
        """Start it, or go on with the run of a known id."""
        import wandb

        section = config.output.wandb
        assert section is not None
        directory = config.output.directory.absolute()
        self._wandb = wandb
        self._run = wandb.init(
            project=section.project,
            entity=section.entity,
            name=section.name or directory.name,
            mode=section.mode,
            dir=directory,
            config=json.loads(json.dumps(config_summary(config), default=str)),
            id=known,
            resume=None if known is None else "allow",
            settings=wandb.Settings(console="off", quiet=True),
        )
        # Its own count of steps takes no number twice; a run that was killed repeats some.
        self._run.define_metric("*", step_metric="step")
        self.id = self._run.id
        self.where = self._run.url if section.mode == "online" else self._run.settings.sync_dir

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Take a step's metrics."""
        self._run.log({**values, "step": step})

    def samples(self, step: int, kind: str, samples: Sequence[Sample]) -> None:
        """Take some responses, as a table."""
        names = ("reward", "prompt", "response", "answer", "source", "tokens")
        rows = [[getattr(sample, name) for name in names] for sample in samples]
        for row in rows:
            row[3] = str(row[3])  # a column has one type
        table = self._wandb.Table(columns=list(names), data=rows)
        self._run.log({f"samples/{kind}": table, "step": step})

    def close(self, *, failed: bool) -> None:
        """Send what is left, and end the run as done or as failed."""
        self._run.finish(exit_code=int(failed))


class MlflowRun:
    """A run of MLflow."""

    def __init__(self, config: RunConfig, known: str | None) -> None:
        """Start it, or go on with the run of a known id."""
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        section = config.output.mlflow
        assert section is not None
        self._metric = Metric
        self._client = MlflowClient(tracking_uri=section.tracking_uri)
        if known is None:
            self.id = self._start(section, config)
        else:
            self.id = known
            self._client.update_run(known, status="RUNNING")
        self.where = (
            f"run {self.id} of the experiment {section.experiment} in {self._client.tracking_uri}"
        )

    def _start(self, section: MlflowConfig, config: RunConfig) -> str:
        """The id of a new run, which knows its settings."""
        from mlflow.entities import Param

        found = self._client.get_experiment_by_name(section.experiment)
        experiment = (
            self._client.create_experiment(section.experiment)
            if found is None
            else found.experiment_id
        )
        name = section.name or config.output.directory.absolute().name
        run: str = self._client.create_run(experiment, run_name=name).info.run_id
        settings = [
            Param(key, str(value)[:_LONGEST_PARAMETER])
            for key, value in _flat(config_summary(config))
        ]
        for first in range(0, len(settings), _PARAMETERS_AT_ONCE):
            some = settings[first : first + _PARAMETERS_AT_ONCE]
            self._client.log_batch(run, params=some)
        return run

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Take a step's metrics."""
        now = time.time_ns() // 1_000_000
        found = [self._metric(_name(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=found)

    def samples(self, step: int, kind: str, samples: Sequence[Sample]) -> None:
        """Take some responses, as a file."""
        path = Path("samples") / kind / f"step_{step:06d}.md"
        self._client.log_text(self.id, markdown(samples), path.as_posix())

    def close(self, *, failed: bool) -> None:
        """End the run as done or as failed."""
        self._client.set_terminated(self.id, status="FAILED" if failed else "FINISHED")


def _name(name: str) -> str:
    return _NOT_IN_A_NAME.sub("_", name.replace("/", "."))


def _flat(values: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and their values."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{path}{_name(str(key))}"
        found += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return found
