"""The `output` section."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_prefix.config.bounds import below, refuse


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


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run leaves behind."""

    directory: Path
    """Folder of the run: `metrics.jsonl`, `samples.jsonl`, `evaluations.jsonl` (the rewards of each
    prompt), `tensorboard/`, `checkpoints/`, `reward.png`."""
    save_every: int = 0
    """Steps between checkpoints; 0: a checkpoint after the last step only."""
    save_in_background: bool = True
    """The run trains on while a checkpoint is written from a copy of the state in host memory."""
    checkpoint_writer: Literal["mcore", "nvrx"] = "mcore"
    """Who writes checkpoints: Megatron-Core's own writer, or that of nvidia-resiliency-ext (0.6 or
    newer, with megatron-core 0.17 or newer). The files are the same."""
    save_last: bool = True
    """Write a checkpoint after the last step."""
    keep: int = 2
    """Checkpoints that are kept; older checkpoints are removed."""
    keep_best: bool = False
    """Write a checkpoint after each evaluation that is better than all before it (`eval`), and keep
    the best one beside the newest `keep`."""
    load: Path | None = None
    """Weights to start from: a checkpoint, or a folder whose newest checkpoint is taken. It is a
    run's, Megatron-LM's, or converted by `tools/convert_checkpoint.py`; null: random weights."""
    resume: bool = True
    """Continue from the latest checkpoint in `directory`, if there is any. false starts anew and
    renames the folder of earlier checkpoints to `checkpoints.1`, `.2`, ..."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    samples: int = 3
    """Responses that are shown on the terminal, in TensorBoard and in `samples.jsonl` at a time,
    from the highest reward to the lowest; 0: none."""
    samples_every: int = 10
    """Steps between samples of training; those of the first step are shown too. Samples of each
    evaluation are shown whatever this is. 0: no samples of training."""
    wandb: WandbConfig | None = None
    """Weights & Biases gets metrics and samples, too, by its package `wandb`; null: it does not."""
    mlflow: MlflowConfig | None = None
    """MLflow gets metrics and samples, too, by its package `mlflow`; null: it does not."""
    plot: bool = True
    """Draw `reward.png` at the end of the run."""

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        yield from below(self, 0, "save_every", "samples", "samples_every")
        yield from below(self, 1, "keep")
