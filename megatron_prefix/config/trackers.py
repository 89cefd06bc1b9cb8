"""Where metrics and samples of a run go beside its folder: sections of `output`."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_prefix.config.bounds import refuse


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases, by its package `wandb`."""

    project: str
    """Project that the run belongs to."""
    entity: str | None = None
    """User or team of the project; null: the one that is logged in."""
    name: str | None = None
    """Name of the run; null: that of `output.directory`."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes into `output.directory`, to be sent later by `wandb sync`."""

    def __post_init__(self) -> None:
        refuse(["project: is empty; name a project"] if not self.project else [])


@dataclass(frozen=True, kw_only=True)
class MlflowConfig:
    """MLflow, by its package `mlflow` or `mlflow-skinny`."""

    experiment: str
    """Experiment that the run belongs to; it is made if there is none."""
    name: str | None = None
    """Name of the run; null: that of `output.directory`."""
    tracking_uri: str | None = None
    """Address of the tracking server, or of a store, without a password; null: MLflow's own
    choice, which `MLFLOW_TRACKING_URI` in the environment decides."""

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        if not self.experiment:
            yield "experiment: is empty; name an experiment"
        if urllib.parse.urlsplit(self.tracking_uri or "").password:
            yield (
                "tracking_uri: holds a password, which files of the run would show; put the "
                "address into the environment as MLFLOW_TRACKING_URI"
            )
