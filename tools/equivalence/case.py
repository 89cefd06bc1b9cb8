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
from megatron_prefix.layout.hybrid_pattern import layers_of
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.planning.shapes import longest_sequence, responses_of
from megatron_prefix.rollouts.records import RolloutGroup
from megatron_prefix.rollouts.routes import RouteShape

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


def mrope_positions(count: int) -> np.ndarray:
    """[3, count] time, height and width of a sequence's tokens, for a model with mRoPE.

    As if images lay in it: the rows differ, and jump back and forth. Sequences that begin alike
    have the same ones there.
    """
    return np.random.default_rng(0).integers(0, 60, (count, 3)).T


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
    recomputed_logprobs: tuple[tuple[np.ndarray, ...], ...] | None = None
    """Of the old policy, where a correction tells it from the one that sampled."""
    data_parallel_size: int
    folder: Path

    @property
    def world_size(self) -> int:
        """Processes of the candidate."""
        return self.parallel.model_parallel_size * self.data_parallel_size


def draw_groups(shapes: list[dict[str, Any]], vocab_size: int, seed: int) -> list[RolloutGroup]:
    """Random rollouts of the given shapes; shared turns have the same tokens."""
    rng = np.random.default_rng(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(int(t) for t in rng.integers(0, vocab_size, count))

    def group(shape: dict[str, Any], index: int) -> RolloutGroup:
        prompt = system[: shape.get("system", 0)] + tokens(shape["prefix"])
        responses = responses_of(shape)
        turns = {t.name: t.tokens for response in responses for t in response.turns}
        drawn = {name: tokens(count) for name, count in turns.items()}
        masks = tuple(response.loss_mask() for response in responses)
        return RolloutGroup(
            prompt=prompt,
            responses=tuple(sum((drawn[t.name] for t in r.turns), ()) for r in responses),
            rewards=tuple(float(r) for r in rng.normal(size=len(responses))),
            loss_mask=None if all(mask.all() for mask in masks) else masks,
            source=f"shape {index}",
        )

    system = tokens(max(shape.get("system", 0) for shape in shapes))
    return [group(shape, index) for index, shape in enumerate(shapes)]


def with_positions(groups: list[RolloutGroup]) -> list[RolloutGroup]:
    """Rollouts whose tokens have the positions of `mrope_positions`."""
    found = []
    for group in groups:
        longest = len(group.prompt) + max(map(len, group.responses))
        shifts = mrope_positions(longest).T - np.arange(longest)[:, None]
        prompt, after = np.split(shifts, [len(group.prompt)])
        found.append(
            dataclasses.replace(
                group,
                prompt_position_shifts=prompt,
                position_shifts=[after[: len(response)] for response in group.responses],
            )
        )
    return found


def with_routes(groups: list[RolloutGroup], model: ModelConfig, seed: int) -> list[RolloutGroup]:
    """Random experts for each token, the same where sequences begin alike; but every third response
    goes ways of its own from somewhere in its prompt on."""
    shape = RouteShape.of_model(model)
    rng = np.random.default_rng(seed + 3)
    drawn: dict[tuple[tuple[int, ...], int], np.ndarray] = {}

    def route(begun: tuple[int, ...], way: int) -> np.ndarray:
        if (begun, way) not in drawn:
            scores = rng.random((sum(shape.with_experts), shape.num_experts))
            drawn[begun, way] = np.sort(scores.argsort(-1)[:, : shape.topk]).astype(shape.dtype)
        return drawn[begun, way]

    found = []
    for g, group in enumerate(groups):
        routes = []
        for r, response in enumerate(group.responses):
            tokens = (*group.prompt, *response)
            parted = int(rng.integers(0, len(group.prompt))) if r % 3 == 2 else len(tokens)
            ways = [0 if i < parted else 1000 * g + r for i in range(len(tokens) - 1)]
            routes.append(np.stack([route(tokens[: i + 1], way) for i, way in enumerate(ways)]))
        found.append(dataclasses.replace(group, routes=routes))
    return found


def trained_tokens(group: RolloutGroup, response: int) -> np.ndarray:
    """The indices of a response's tokens that are trained on."""
    if group.loss_mask is None:
        return np.arange(len(group.responses[response]))
    return np.flatnonzero(group.loss_mask[response])


def with_outcomes(
    groups: list[RolloutGroup], objective: ObjectiveConfig, seed: int
) -> list[RolloutGroup]:
    """Equal rewards in every second group where such are skipped, and which responses are finished
    where that decides what is trained on."""
    rng = np.random.default_rng(seed + 2)
    found = []
    for index, group in enumerate(groups):
        count = len(group.responses)
        if objective.zero_advantages == "skip" and index % 2:
            group = dataclasses.replace(group, rewards=(1.0,) * count)
        if objective.overlong is not None and objective.overlong.kind == "mask":
            finished = tuple(bool(value) for value in rng.random(count) < 0.7)
            group = dataclasses.replace(group, finished=finished)
        found.append(group)
    return found


def with_old_logprobs(case: Case, sampled: list[list[np.ndarray]], seed: int) -> Case:
    """Old and reference log-probabilities near the current ones, so that clipping takes part.

    With a correction, those of the rollouts are the sampling policy's, a few of them impossible,
    and the old policy's come beside them.
    """
    rng = np.random.default_rng(seed + 1)
    corrects = case.objective.correction is not None

    def near(values: np.ndarray) -> np.ndarray:
        return np.minimum(values + rng.normal(scale=0.25, size=values.shape), -1e-3)

    def of_record(values: np.ndarray) -> np.ndarray:
        drawn = near(values)
        if corrects:
            drawn[rng.random(len(drawn)) < 0.1] = -9999.0
        # A run keeps them in float32: the reference sees the same rounded values.
        return drawn.astype(np.float32).astype(np.float64)

    groups = tuple(
        dataclasses.replace(group, old_logprobs=tuple(of_record(v) for v in values))
        for group, values in zip(case.groups, sampled, strict=True)
    )
    reference, recomputed = (
        tuple(tuple(near(v) for v in values) for values in sampled) for _ in range(2)
    )
    return dataclasses.replace(
        case,
        groups=groups,
        reference_logprobs=reference,
        recomputed_logprobs=recomputed if corrects else None,
    )


def check_layout(
    model: ModelConfig,
    parallel: ParallelConfig,
    data_parallel_size: int,
    optimizer_steps: int,
    training: TrainingConfig,
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
    transformer_config(model, parallel, training)


def check_lengths(shapes: list[dict[str, Any]], model: ModelConfig, path: Path | None) -> None:
    """Refuse sequences beyond the model's positions, and prompts without room for predictions.

    Raises:
        ValueError: naming the file and the entry.
    """
    for index, shape in enumerate(shapes):
        longest = longest_sequence(shape)
        if longest > model.max_sequence_length:
            raise ValueError(
                f"{path or 'shapes'}: entry {index}: a prefix and response of {longest} tokens "
                f"exceed the model's max_sequence_length: {model.max_sequence_length}"
            )
        depths = model.transformer.get("mtp_num_layers") or 0
        if shape.get("system", 0) + shape["prefix"] <= depths:
            raise ValueError(
                f"{path or 'shapes'}: entry {index}: a prompt of at most mtp_num_layers: {depths} "
                "tokens leaves trained tokens that nothing predicts, which Megatron's releases "
                "count differently; make it longer"
            )


def with_comm_types(model: ModelConfig, kinds: list[str]) -> ModelConfig:
    """The model with one kind of context-parallel communication, or with several by turns."""
    pattern = model.hybrid_layer_pattern
    layers = model.transformer["num_layers"] if pattern is None else len(layers_of(pattern))
    value = kinds[0] if len(kinds) == 1 else [kinds[i % len(kinds)] for i in range(layers)]
    return dataclasses.replace(model, transformer={**model.transformer, "cp_comm_type": value})
