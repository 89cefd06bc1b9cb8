"""The files, folders and names outside a run's configuration that it asks for.

They are looked for before torch is imported, together with the packages (`requirements`): all that
is wrong is said at once. What changes after that, or cannot be told without reading it, is found
where it is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megatron_prefix.checkpoints.files import complete_steps
from megatron_prefix.checkpoints.finding import find_checkpoint
from megatron_prefix.config import RunConfig
from megatron_prefix.packages import is_installed
from megatron_prefix.rollouts.gym.checks import faults_of_tasks
from megatron_prefix.rollouts.names import fault_of_name, fault_of_path


def faults_of_surroundings(config: RunConfig, rank: int) -> list[str]:
    """A line for each thing that is missing or in the way, with what to do.

    Args:
        rank: this process's. Every rank reads the files of rollouts and prompts. Folders are looked
            at by rank 0, which decides whether a run resumes.
    """
    faults = [*_faults_of_rollouts(config), *_faults_of_writer(config)]
    if rank == 0:
        faults += [*_faults_of_load(config), *_faults_of_directory(config.output.directory)]
    return faults


def _faults_of_rollouts(config: RunConfig) -> Iterator[str]:
    rollouts, evaluation = config.rollouts, config.evaluation
    keys = {"rollouts.paths": rollouts.files}
    if evaluation is not None:
        for name, paths in evaluation.data_sets.items():
            keys[f"evaluation.paths.{name}" if name else "evaluation.paths"] = paths
    are_there = True
    for key, paths in keys.items():
        for path in paths:
            if fault := fault_of_path(path):
                are_there = False
                yield f"{key}: {fault}"
    if are_there:
        yield from faults_of_tasks(config)
    for key, spec in rollouts.reward_specs.items():
        fault = fault_of_name(spec, has_tokenizer=rollouts.text is not None)
        if fault:
            yield f"rollouts.{key}: {spec}: {fault}"
    if rollouts.text is not None and _is_missing_folder(rollouts.text.tokenizer):
        yield f"rollouts.text.tokenizer: {rollouts.text.tokenizer}: there is no such folder"


def _is_missing_folder(path: Path) -> bool:
    """Whether there is nothing, and it cannot be a name in Hugging Face's cache: `owner/name`."""
    is_folder = path.is_absolute() or len(path.parts) > 2 or ".." in path.parts
    return is_folder and not path.exists()


def _faults_of_writer(config: RunConfig) -> Iterator[str]:
    name = config.output.checkpoint_writer
    if name == "nvrx" and not is_installed("nvidia_resiliency_ext"):
        yield (
            f"output.checkpoint_writer: {name} needs nvidia-resiliency-ext 0.6 or newer, which is "
            "not installed; install it, or set output.checkpoint_writer: mcore"
        )


def _faults_of_load(config: RunConfig) -> Iterator[str]:
    output = config.output
    if output.load is None or (output.resume and _has_checkpoint(output.directory)):
        return
    try:
        find_checkpoint(output.load)
    except (ValueError, OSError) as error:
        yield f"output.load: {error}"


def _has_checkpoint(directory: Path) -> bool:
    try:
        return bool(complete_steps(directory / "checkpoints"))
    except OSError:  # the folder's own fault is said for output.directory
        return True


def _faults_of_directory(directory: Path) -> Iterator[str]:
    nearest = directory.absolute()
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    begin = f"output.directory: {directory} cannot be written"
    if not nearest.is_dir():
        yield f"{begin}: Not a directory: {nearest}; name another folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        yield f"{begin}: Permission denied: {nearest}; name another folder, or make it writable"
