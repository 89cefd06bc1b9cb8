"""Rollouts that were made but not trained on when a run was stopped, kept beside its checkpoint.

Rank 0 writes and reads them; nothing here is collective.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.checkpoints.files import write_whole
from megatron_prefix.rollouts.records import RolloutBatch

_NAME = "waiting_rollouts.npz"
_TEXT = "text"
"""Name of the array that holds what is no array, as JSON."""


def write_waiting(checkpoint: Path, batch: RolloutBatch, engine_state: dict[str, Any]) -> None:
    """Keep a rollout batch, and where its engine stands after it, in a checkpoint's folder."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    del values["records"]  # its rewards are computed
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    rest = {name: value for name, value in values.items() if name not in arrays}
    named = {name: values.tolist() for name, values in batch.named_rewards.items()}
    text = json.dumps({"batch": {**rest, "named_rewards": named}, "engine": engine_state}).encode()
    arrays[_TEXT] = np.frombuffer(text, dtype=np.uint8)
    write_whole(checkpoint / _NAME, lambda file: np.savez(file, **arrays))


def read_waiting(checkpoint: Path) -> tuple[RolloutBatch, dict[str, Any]] | None:
    """What `write_waiting` kept there; None where it kept nothing.

    Raises:
        ValueError: the file was changed and holds no rollouts.
    """
    path = checkpoint / _NAME
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        values = json.loads(arrays.pop(_TEXT).tobytes())
        rest = values["batch"]
        named = rest.get("named_rewards", {})
        rest["named_rewards"] = {name: np.array(found) for name, found in named.items()}
        rest |= {name: tuple(rest[name]) for name in ("answers", "sources")}
        return RolloutBatch(**arrays, **rest), values["engine"]
    except (ValueError, KeyError, TypeError, EOFError, AssertionError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: not the rollouts of a stopped run ({error!r}); remove it to have them made "
            "again"
        ) from error
