"""What a run would compute and hold, from its model, its parallel layout and its groups' shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prefix.attention.comm_types import layer_comm_type
from megatron_prefix.config import (
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    TrainingConfig,
)
from megatron_prefix.config.loader import ConfigError, load_dataclass, read_yaml
from megatron_prefix.config.packing import packing_of_run
from megatron_prefix.model.transformer_config import transformer_config
from megatron_prefix.planning.estimate import StepEstimate, estimate_step
from megatron_prefix.planning.rows import StepSetup
from megatron_prefix.planning.shapes import prompt_tokens, responses_of, tree_of_shape
from megatron_prefix.planning.sizes import memory_model, rank_sizes, stage_layers


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """The parts of a run's config that a plan depends on."""

    model: ModelConfig
    parallel: ParallelConfig
    training: TrainingConfig
    optimizer: OptimizerSettings
    data_parallel_size: int = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One optimizer step with shared prefixes, and without."""

    grouped: StepEstimate
    ungrouped: StepEstimate
    skipped_groups: int
    """Groups whose prefix is not shared since that would not pay."""

    @property
    def flops_ratio(self) -> float:
        """Ungrouped over grouped: what a step's time ratio is where matrix products bound it."""
        return self.ungrouped.flops / self.grouped.flops

    @property
    def tokens_ratio(self) -> float:
        """Ungrouped over grouped."""
        return self.ungrouped.tokens / self.grouped.tokens


def read_sections(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of a run's YAML file, of which a plan reads some; `model` is required.

    Raises:
        ConfigError: not a mapping of sections, or without a model.
        OSError: the file cannot be read.
    """
    values = read_yaml(path)
    for name in ("model", "parallel", "training", "optimizer"):
        if not isinstance(values.get(name, {}), dict):
            raise ConfigError(f"{name}: {values[name]!r} is not a mapping of keys to values")
    if "model" not in values:
        raise ConfigError("model: required, but not set; give a run's YAML or its model section")
    return values


def load_planned_run(
    sections: dict[str, dict[str, Any]],
    *,
    parallel: dict[str, Any],
    training: dict[str, Any],
    data_parallel_size: int,
) -> PlannedRun:
    """The sections of a run's file with some of their keys replaced.

    Raises:
        ConfigError: as for a run, naming the key.
    """
    return PlannedRun(
        model=load_dataclass(ModelConfig, sections["model"], path="model"),
        parallel=load_dataclass(
            ParallelConfig, {**sections.get("parallel", {}), **parallel}, path="parallel"
        ),
        training=load_dataclass(
            TrainingConfig,
            {"steps": 1, **sections.get("training", {}), **training},
            path="training",
        ),
        optimizer=load_dataclass(
            OptimizerSettings, sections.get("optimizer", {}), path="optimizer"
        ),
        data_parallel_size=data_parallel_size,
    )


def plan_run(run: PlannedRun, shapes: Sequence[dict[str, Any]]) -> Plan:
    """Plan one optimizer step over groups of these shapes.

    Raises:
        ConfigError: a layout that Megatron or this package refuses.
        ValueError: a group that does not fit the token budget, naming it.
    """
    parallel = run.parallel
    world = run.data_parallel_size * parallel.model_parallel_size
    parallel.data_parallel_size(world)
    config = transformer_config(run.model, parallel, run.training)
    memory = memory_model(run.model, config, run.training)
    comm_type = layer_comm_type(config, 1)
    setup = StepSetup(
        memory=memory,
        ranks=rank_sizes(parallel, run.optimizer, data_parallel_size=run.data_parallel_size),
        stages=stage_layers(config),
        packing=packing_of_run(
            run.training,
            parallel,
            model_shape=memory.shape,
            data_parallel_size=run.data_parallel_size,
        ),
        comm_type=comm_type,
    )
    trees = [tree_of_shape(shape, index) for index, shape in enumerate(shapes)]
    prompts = [prompt_tokens(shape) for shape in shapes]
    # Planned as if each response were trained on as a whole: what a turn of a tool saves of the
    # output layer is left out.
    first_trained = [
        [prompt] * tree.num_sequences for prompt, tree in zip(prompts, trees, strict=True)
    ]
    names = [
        f"prefix {prompt}, responses {[response.tokens for response in responses_of(shape)]}"
        for prompt, shape in zip(prompts, shapes, strict=True)
    ]
    grouped = estimate_step(trees, setup, first_trained=first_trained, names=names)
    packing = setup.packing
    ungrouped = estimate_step(
        trees,
        dataclasses.replace(setup, packing=dataclasses.replace(packing, sharing="none")),
        first_trained=first_trained,
        names=names,
    )
    skipped = 0
    if packing.sharing != "none":
        skipped = sum(packing.group(tree).grouped_tokens > tree.grouped_tokens for tree in trees)
    return Plan(grouped=grouped, ungrouped=ungrouped, skipped_groups=skipped)
