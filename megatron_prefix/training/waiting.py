"""Rollouts that were made but not trained on when a run was stopped, kept beside its checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_prefix.checkpoints.files import write_whole
from megatron_prefix.rollouts.records import RolloutGroup

_NAME = "waiting_rollouts.json"


def write_waiting(
    checkpoint: Path, groups: Sequence[RolloutGroup], engine_state: dict[str, Any]
) -> None:
    """Keep a rollout batch, and where its engine stands after it, in a checkpoint's folder."""
    values = {"groups": [dataclasses.asdict(group) for group in groups], "engine": engine_state}
    write_whole(checkpoint / _NAME, json.dumps(values))


def read_waiting(checkpoint: Path) -> tuple[list[RolloutGroup], dict[str, Any]] | None:
    """What `write_waiting` kept there; None where it kept nothing.

    Raises:
        ValueError: the file was changed and holds no rollouts.
    """
    path = checkpoint / _NAME
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return [_group(group) for group in values["groups"]], values["engine"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not the rollouts of a stopped run ({error!r}); remove it to have them made "
            "again"
        ) from error


def _group(values: dict[str, Any]) -> RolloutGroup:
    return RolloutGroup(
        **{name: value if name == "answer" else _tuples(value) for name, value in values.items()}
    )


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
