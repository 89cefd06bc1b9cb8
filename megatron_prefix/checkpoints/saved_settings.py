"""Settings of the optimizer that a checkpoint was saved with, and those of the run that loads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

logger = logging.getLogger(__name__)


def _saved_settings(state: dict[str, Any]) -> dict[str, Any]:
    """The optimizer section of the run that saved a checkpoint; empty where none is recorded."""
    return state.get("config", {}).get("optimizer", {})


def change_of_clipping(state: dict[str, Any], clip_grad: float) -> list[str]:
    """Clipping is no state of the optimizer: only the configuration that was saved says it."""
    saved = _saved_settings(state).get("clip_grad", clip_grad)
    return [] if saved == clip_grad else [f"optimizer.clip_grad {saved} -> {clip_grad}"]


def check_sharding(path: Path, state: dict[str, Any], *, sharded: bool) -> None:
    """Refuse a checkpoint whose optimizer state Megatron wrote in the form of the other optimizer.

    Raises:
        ValueError: it did.
    """
    saved = _saved_settings(state).get("use_distributed_optimizer", sharded)
    if saved != sharded:
        raise ValueError(
            f"optimizer.use_distributed_optimizer: {str(sharded).lower()}, but {path} was saved "
            f"with {str(saved).lower()}, and Megatron-Core stores the two in different forms; set "
            f"it to {str(saved).lower()}, or start a new run with output.load: {path.parent}"
        )


def log_changes(changes: list[str], *, keep_settings: bool) -> None:
    """Say on rank 0 which settings differ, and which of the two are used."""
    if changes and dist.get_rank() == 0:
        logger.info(
            "%s (optimizer.on_resume: %s): %s",
            "the settings of the checkpoint are used, not those of the configuration"
            if keep_settings
            else "the settings of the configuration are used, not those of the checkpoint",
            "checkpoint" if keep_settings else "config",
            ", ".join(changes),
        )
