"""The `output` section."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_prefix.config.bounds import at_least


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run leaves behind."""

    directory: Path
    """Metrics (metrics.jsonl, tensorboard/), checkpoints (checkpoints/), reward curve."""
    save_every: int = 0
    """Steps between checkpoints; 0: only after the last step."""
    save_in_background: bool = True
    """Train on while a checkpoint is written, from a copy of the state in host memory."""
    save_last: bool = True
    keep: int = 2
    """Checkpoints kept; older ones are removed."""
    load: Path | None = None
    """A checkpoint, or a folder whose newest is taken, to start from (weights only): a run's, one
    that tools/convert_checkpoint.py has made of a Hugging Face model, or Megatron-LM's."""
    resume: bool = True
    """Continue from this directory's latest checkpoint where there is one; false starts anew and
    renames the checkpoints that are there to checkpoints.1, .2, ..."""
    tensorboard: bool = True
    plot: bool = True
    """Write reward.png."""

    def __post_init__(self) -> None:
        at_least(self, 0, "save_every")
        at_least(self, 1, "keep")
