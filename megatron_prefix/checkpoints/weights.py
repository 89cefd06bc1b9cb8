"""The weights of a distributed checkpoint, loaded at any layout."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_prefix.checkpoints.finding import find_checkpoint
from megatron_prefix.checkpoints.initial_weights import use_stored_names
from megatron_prefix.model.build import ModelChunks


def load_weights(
    path: Path, chunks: ModelChunks, optimizer: MegatronOptimizer | None = None
) -> None:
    """Load the weights only, from a checkpoint of this or any Megatron trainer. Collective.

    Args:
        path: a checkpoint, or a folder of them whose newest is taken: a run's, one of
            Megatron-LM's or of `tools/convert_checkpoint.py`.
        optimizer: takes the weights over.

    Raises:
        ValueError: the folder holds no distributed checkpoint, or it does not fit the model.
    """
    path = find_checkpoint(path)
    wanted = model_state(chunks)
    use_stored_names(wanted, path)
    load_model_state(chunks, load_state(wanted, path))
    if optimizer is not None:
        optimizer.reload_model_params()


def model_state(chunks: ModelChunks) -> dict[str, Any]:
    """The sharded state dict of all chunks on this rank."""
    if len(chunks.bare) == 1:
        return {"model": chunks.bare[0].sharded_state_dict()}
    return {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks.bare)}


def load_model_state(chunks: ModelChunks, loaded: dict[str, Any]) -> None:
    """Put what `load_state` gave for `model_state` into the chunks."""
    for i, chunk in enumerate(chunks.bare):
        chunk.load_state_dict(loaded["model" if len(chunks.bare) == 1 else f"model{i}"])


def load_state(wanted: dict[str, Any], path: Path) -> dict[str, Any]:
    """Read the parts that a sharded state dict asks for.

    Raises:
        ValueError: they are not there, have other shapes, or cannot be read.
    """
    if not dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        raise ValueError(f"{path}: not a Megatron distributed checkpoint (no metadata.json)")
    try:
        return dist_checkpointing.load(wanted, str(path))
    except dist_checkpointing.core.CheckpointingException as error:
        raise _misfit(path, str(error)) from error
    except CheckpointException as error:
        # torch collects what each rank raised while it planned its reads, or read.
        failures = [exception for exception, _ in error.failures.values()]
        reasons = "; ".join(sorted(set(map(_reason, failures))))
        if any(map(_is_unreadable, failures)):
            raise _unreadable(path, reasons) from error
        raise _misfit(path, reasons) from error
    except Exception as error:
        if _is_unreadable(error):
            raise _unreadable(path, str(error)) from error
        raise


def _reason(error: BaseException) -> str:
    """What an error says, without the names of all that a checkpoint has, which Megatron lists."""
    missing, is_known, _ = str(error).partition(" from model not in state dict")
    # A KeyError's text is in quotes.
    return "it has no " + missing.lstrip("'\"") if is_known else str(error)


def _misfit(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path}: does not fit this model: {reason}. Set the model section as it was, or begin "
        "anew: in another output.directory, or with output.resume: false"
    )


def _is_unreadable(error: BaseException) -> bool:
    """Whether this comes from a file's content, not from what is asked of it."""
    return isinstance(error, (OSError, EOFError, pickle.UnpicklingError)) or (
        isinstance(error, RuntimeError) and "PytorchStreamReader" in str(error)
    )


def _unreadable(path: Path, reason: str) -> ValueError:
    first_line = (reason.splitlines() or [""])[0]
    return ValueError(
        f"{path}: cannot be read: {first_line}. If the file system is well, the checkpoint is "
        "damaged: move it away to continue from the one before it"
    )
