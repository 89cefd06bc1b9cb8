"""Where metrics and samples of a run go beside its folder: sections of `output`."""

from __future__ import annotations

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
    """Address of the tracking server, or of a store; null: MLflow's own choice, which
    `MLFLOW_TRACKING_URI` in the environment decides."""

    def __post_init__(self) -> None:
        refuse(["experiment: is empty; name an experiment"] if not self.experiment else [])
