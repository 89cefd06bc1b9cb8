"""What both sides of the proof are given: the model, the layout and the rollouts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.config import (
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    TrainingConfig,
)
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.rollouts.records import RolloutGroup

DEFAULT_SHAPES: list[dict[str, Any]] = [
    {"prefix": 24, "responses": [5, 9, 3, 7]},
    {"prefix": 1, "responses": [4, 6]},
    {"prefix": 17, "responses": [1, 1, 12]},
    {"prefix": 30, "responses": [8]},
    {"prefix": 9, "responses": [2, 40, 1, 5, 3]},
    {"prefix": 1, "responses": [1]},
    {"system": 19, "prefix": 40, "responses": [21, 17, 33, 9]},
    {"system": 19, "prefix": 3, "responses": [11, 90]},
    {"system": 19, "prefix": 1, "responses": [7]},
]

DEFAULT_MODEL: dict[str, Any] = {
    "vocab_size": 93,
    "max_sequence_length": 128,
    "position_embedding_type": "rope",
    "activation": "silu",
    "transformer": {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "ffn_hidden_size": 96,
        "gated_linear_unit": True,
        "qk_layernorm": True,
        "add_qkv_bias": True,
    },
}

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that both sides are given."""

    model: ModelConfig
    parallel: ParallelConfig
    training: TrainingConfig
    optimizer: OptimizerSettings
    objective: ObjectiveConfig
    groups: tuple[RolloutGroup, ...]
    reference_logprobs: tuple[tuple[np.ndarray, ...], ...] | None
    data_parallel_size: int
    folder: Path

    @property
    def world_size(self) -> int:
        """Processes of the candidate."""
        return self.parallel.model_parallel_size * self.data_parallel_size


def draw_groups(shapes: list[dict[str, Any]], vocab_size: int, seed: int) -> list[RolloutGroup]:
    """Random rollouts of the given shapes."""
    rng = np.random.default_rng(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(int(t) for t in rng.integers(0, vocab_size, count))

    system = tokens(max(shape.get("system", 0) for shape in shapes))
    return [
        RolloutGroup(
            prompt=system[: shape.get("system", 0)] + tokens(shape["prefix"]),
            responses=tuple(tokens(length) for length in shape["responses"]),
            rewards=tuple(float(r) for r in rng.normal(size=len(shape["responses"]))),
            old_logprobs=None,
            source=f"shape {index}",
        )
        for index, shape in enumerate(shapes)
    ]


def with_old_logprobs(case: Case, sampled: list[list[np.ndarray]], seed: int) -> Case:
    """Old and reference log-probabilities near the current ones, so that clipping takes part."""
    rng = np.random.default_rng(seed + 1)

    def near(values: np.ndarray) -> np.ndarray:
        return np.minimum(values + rng.normal(scale=0.25, size=values.shape), -1e-3)

    # A run keeps old log-probabilities in float32: the reference sees the same rounded values.
    groups = tuple(
        dataclasses.replace(
            group, old_logprobs=tuple(near(v).astype(np.float32).astype(np.float64) for v in values)
        )
        for group, values in zip(case.groups, sampled, strict=True)
    )
    reference = tuple(tuple(near(v) for v in values) for values in sampled)
    return dataclasses.replace(case, groups=groups, reference_logprobs=reference)


def check_layout(
    model: ModelConfig, parallel: ParallelConfig, data_parallel_size: int, optimizer_steps: int
) -> None:
    """Refuse, before any process starts, what a run's configuration would be refused for.

    Raises:
        ValueError: naming the option.
    """
    from megatron_prefix.model.transformer_config import transformer_config

    for name, value in (("dp", data_parallel_size), ("optimizer-steps", optimizer_steps)):
        if value < 1:
            raise ValueError(f"{name}: {value} must be at least 1")
    parallel.data_parallel_size(parallel.model_parallel_size * data_parallel_size)
    training = TrainingConfig(steps=1, token_budget=1, dtype="float32", device="cpu")
    transformer_config(model, parallel, training)


def check_lengths(shapes: list[dict[str, Any]], model: ModelConfig, path: Path | None) -> None:
    """Refuse sequences beyond the model's positions.

    Raises:
        ValueError: naming the file and the entry.
    """
    for index, shape in enumerate(shapes):
        longest = shape.get("system", 0) + shape["prefix"] + max(shape["responses"])
        if longest > model.max_sequence_length:
            raise ValueError(
                f"{path or 'shapes'}: entry {index}: a prefix and response of {longest} tokens "
                f"exceed the model's max_sequence_length: {model.max_sequence_length}"
            )


def with_comm_types(model: ModelConfig, kinds: list[str]) -> ModelConfig:
    """The model with one kind of context-parallel communication, or with several by turns."""
    layers = model.transformer["num_layers"]
    value = kinds[0] if len(kinds) == 1 else [kinds[i % len(kinds)] for i in range(layers)]
    return dataclasses.replace(model, transformer={**model.transformer, "cp_comm_type": value})
