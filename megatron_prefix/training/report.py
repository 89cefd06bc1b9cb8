"""What a run tells the person who started it, on rank 0's stderr.

At its start: the model, its weights, layout, data, steps and output. Then a bar in a terminal, or
one line a step anywhere else. At its end: what is saved and what comes next.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from megatron_prefix.checkpoints.folder import CheckpointFolder
from megatron_prefix.config import RunConfig
from megatron_prefix.config.loader import dump_yaml
from megatron_prefix.distributed.runtime import Runtime
from megatron_prefix.model.build import ModelChunks
from megatron_prefix.model.parameter_shards import parameter_shards
from megatron_prefix.rollouts.record_files import open_record_file

_COUNTED_BYTES = 1 << 28
"""Records are counted in files of at most so many bytes together; a second or two of reading."""

CONFIG_NAME = "config.yaml"
"""Beside the metrics: the configuration with all defaults and overrides, loadable as a run's."""

_SHOWN = {
    "reward": ("reward", ".3f"),
    "eval": ("eval", ".3f"),
    "policy_loss": ("loss", ".3g"),
    "grad_norm": ("grad_norm", ".3f"),
    "lr": ("lr", ".3g"),
    "tokens_per_second": ("tokens/s", ",.0f"),
}
"""Metrics of a step that are shown: their name there, and how they are written."""


def say(text: str) -> None:
    """Write a line for the user."""
    print(text, file=sys.stderr, flush=True)


def say_above_bar(text: str) -> None:
    """Write lines for the user while `progress` shows a bar, if it does."""
    if not sys.stderr.isatty():
        say(text)
        return
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def count_parameters(chunks: ModelChunks) -> int:
    """Parameters of the whole model, each counted once. Collective over all ranks."""
    own = {shard.key: math.prod(shard.global_shape) for shard in parameter_shards(chunks)}
    found: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, own)
    return sum({key: size for of_rank in found for key, size in of_rank.items()}.values())


def report_start(
    config: RunConfig,
    runtime: Runtime,
    chunks: ModelChunks,
    *,
    weights: str,
    step: int,
    writes: bool = True,
) -> None:
    """Say what a run is, and write its effective configuration. Collective over all ranks.

    Args:
        weights: where they are from.
        step: steps that have been done before.
        writes: False: the configuration is not written.
    """
    parameters = count_parameters(chunks)
    if not runtime.is_main:
        return
    for line in _start_lines(config, runtime, parameters=parameters, weights=weights, step=step):
        say(line)
    if not writes:
        return
    directory = config.output.directory
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_NAME).write_text(dump_yaml(config), encoding="utf-8")


def report_end(
    config: RunConfig,
    checkpoints: CheckpointFolder,
    *,
    began: int,
    step: int,
    why: str,
    best: tuple[int, float] | None = None,
) -> None:
    """Say what a run has done, and what comes next. For rank 0.

    Args:
        began: steps that had been done before it.
        step: steps that are done now.
        why: why it ended before its last step; empty where it did not.
        best: step and score of the best evaluation.
    """
    steps = config.training.steps
    if began >= steps:
        say(
            f"done: all {steps} steps were done before; raise training.steps to train on, or name "
            "another output.directory"
        )
        return
    newest = max(checkpoints.steps(), default=None)
    saved = newest is not None and newest > began
    if best is not None:
        at, score = best
        where = f" ({checkpoints.path(at)})" if at in checkpoints.steps() else ""
        say(f"best: eval {score:.3f} after step {at}{where}")
    say(f"saved: {checkpoints.path(newest) if saved else 'no checkpoint of these steps'}")
    if step < steps:
        say(f"ended after step {step} of {steps}: {why}")
    elif saved:
        say(
            f"done: {step} of {steps} steps; raise training.steps to train on"
            f"{_way_out(config, checkpoints)}"
        )
    else:
        say(f"done: {step} of {steps} steps")


def _way_out(config: RunConfig, checkpoints: CheckpointFolder) -> str:
    if config.model.hybrid_layer_pattern is not None:
        # No Hugging Face family converts to a HybridModel.
        return ""
    command = f"tools/convert_checkpoint.py megatron-to-hf {checkpoints.directory} HF_FOLDER"
    return f", or take the model out: {command}"


def _start_lines(
    config: RunConfig, runtime: Runtime, *, parameters: int, weights: str, step: int
) -> list[str]:
    training, rollouts = config.training, config.rollouts
    left = training.steps - step
    updates = training.optimizer_steps_per_rollout * training.epochs_per_rollout
    return [
        f"model: {parameters:,} parameters in {training.dtype}, {weights}",
        f"layout: {_layout(config, runtime)}, on {training.device}",
        f"rollouts: engine {rollouts.engine}, {_files(config)}, "
        f"{_count(rollouts.groups_per_step, 'group', 'groups')} a step",
        *_routes(training.replayed_routes),
        f"steps: {left} to do of {training.steps}, "
        f"{_count(updates, 'optimizer step', 'optimizer steps')} each",
        f"output: {config.output.directory.absolute()}",
    ]


def _routes(kind: str | None) -> list[str]:
    """What becomes of the routes in records, where there are any."""
    if kind is None:
        return []
    said = {
        "exact": "replayed as the records have them",
        "first": "replayed, and a group's prompt has those of its first response: another run than "
        "one without sharing",
        "ignore": "those of the records are not replayed",
    }[kind]
    return [f"routes: {said} (training.replayed_routes: {kind})"]


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _layout(config: RunConfig, runtime: Runtime) -> str:
    parallel = config.parallel
    sizes = {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "context": parallel.context_parallel_size,
        "data": runtime.data_parallel_size,
    }
    text = f"{_count(runtime.world_size, 'process', 'processes')} = "
    text += " x ".join(f"{name} {size}" for name, size in sizes.items())
    if parallel.num_model_chunks > 1:
        text += f", {parallel.num_model_chunks} model chunks a pipeline rank"
    if parallel.expert_model_parallel_size > 1:
        text += f", experts over {parallel.expert_model_parallel_size} ranks"
    return text


def _files(config: RunConfig) -> str:
    paths = config.rollouts.files
    names = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files ({paths[0]}, ...)"
    size = sum(path.stat().st_size for path in paths)
    if size > _COUNTED_BYTES:
        return f"{names} ({size / 1e9:.1f} GB)"
    try:
        records = sum(open_record_file(path).count() for path in paths)
    except ValueError:  # whoever reads it says more, on all ranks
        return names
    return f"{_count(records, 'record', 'records')} in {names}"


@contextlib.contextmanager
def progress(config: RunConfig, done: int) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    """What is called with each step's number and metrics: it moves a bar, or writes a line.

    Args:
        config: the run's.
        done: steps that were done before.
    """
    steps = config.training.steps
    # Advantages of a group add up to 0, and so the loss of most objectives says nothing.
    hidden = "reward" if config.objective.name == "supervised" else "policy_loss"
    if not sys.stderr.isatty():
        yield lambda step, metrics: say(_step_line(step, steps, _shown(metrics, hidden)))
        return
    from tqdm import tqdm

    with tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True) as bar:

        def advance(step: int, metrics: dict[str, Any]) -> None:
            bar.set_postfix(_shown(metrics, hidden), refresh=False)
            bar.update(1)

        yield advance


def _step_line(step: int, steps: int, shown: dict[str, str]) -> str:
    return "  ".join([f"step {step}/{steps}", *(f"{name} {text}" for name, text in shown.items())])


def _shown(metrics: dict[str, Any], hidden: str) -> dict[str, str]:
    return {
        name: format(metrics[key], form)
        for key, (name, form) in _SHOWN.items()
        if key in metrics and key != hidden
    }
