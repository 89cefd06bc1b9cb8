"""Optimizer steps of one model over the same rollouts, planned and packed in several ways."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.config import ParallelConfig, TrainingConfig
from megatron_prefix.config.packing import packing_of_run
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.model.build import build_model_chunks, model_shape
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.rollouts.records import RolloutGroup
from megatron_prefix.training.minibatch import Minibatch, build_minibatch

from .levels import OBJECTIVE, StepRunner
from .shapes import ModelSizes


@dataclass(frozen=True, kw_only=True)
class Side:
    """How a step is planned and packed."""

    training: TrainingConfig
    objective: ObjectiveConfig = OBJECTIVE


@contextlib.contextmanager
def build_steps(
    sides: Mapping[str, Side], groups: Sequence[RolloutGroup], *, sizes: ModelSizes, seed: int
) -> Iterator[dict[str, tuple[StepRunner, Minibatch]]]:
    """For each side a step that can be run, on one thread of this process.

    Args:
        sides: all of one dtype.
        groups: the rollouts.
        sizes: of the model.
        seed: of its weights.
    """
    torch.set_num_threads(1)
    model, parallel = sizes.config(), ParallelConfig()
    training = next(iter(sides.values())).training
    with runtime(
        parallel,
        device="cpu",
        seed=seed,
        timeout_minutes=60,
        float64=training.dtype == "float64",
    ) as place:
        chunks = build_model_chunks(model, parallel, training, use_distributed_optimizer=False)
        setup = AttentionSetup.of(chunks.config, place.device)
        found = {}
        for name, side in sides.items():
            packing = packing_of_run(
                side.training,
                parallel,
                model_shape=model_shape(model, chunks.config),
                data_parallel_size=1,
            )
            minibatch = build_minibatch(
                groups, side.objective, packing, attention=setup, data_parallel_rank=0
            )
            found[name] = StepRunner(chunks, minibatch.batches), minibatch
        yield found
