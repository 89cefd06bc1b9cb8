"""Converted checkpoints in models, as a run that starts from them has them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron.core.optimizer import MegatronOptimizer

from megatron_prefix.checkpoints.initial_weights import check_initial_weights
from megatron_prefix.checkpoints.weights import load_weights
from megatron_prefix.config import ModelConfig, OptimizerSettings, ParallelConfig
from megatron_prefix.config.loader import load_dataclass, read_yaml
from megatron_prefix.model.build import ModelChunks, build_model_chunks
from megatron_prefix.training.optimizer import build_optimizer
from tests.megatron.models import TRAINING


def model_section(megatron: Path) -> ModelConfig:
    """The model that a converted checkpoint holds."""
    return load_dataclass(ModelConfig, read_yaml(megatron / "model.yaml")["model"])


def load_converted(
    megatron: Path, parallel: ParallelConfig
) -> tuple[ModelConfig, ModelChunks, MegatronOptimizer]:
    """Build the model of a converted checkpoint in the current runtime and load it, in float32."""
    training = dataclasses.replace(TRAINING, dtype="float32")
    model = model_section(megatron)
    chunks = build_model_chunks(model, parallel, training, use_distributed_optimizer=True)
    optimizer = build_optimizer(OptimizerSettings(), chunks)
    check_initial_weights(megatron, model, chunks)
    load_weights(megatron, chunks, optimizer)
    return model, chunks, optimizer
