"""A whole run's configuration, with what its sections ask of each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_prefix.config.bounds import refuse
from megatron_prefix.config.evaluation import EvaluationConfig
from megatron_prefix.config.model import ModelConfig
from megatron_prefix.config.optimizer import OptimizerSettings
from megatron_prefix.config.output import OutputConfig
from megatron_prefix.config.parallel import ParallelConfig
from megatron_prefix.config.rollouts import RolloutsConfig
from megatron_prefix.config.training import TrainingConfig, faults_of_layout
from megatron_prefix.objective.config import ObjectiveConfig
from megatron_prefix.objective.unused import unused_options


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig
    training: TrainingConfig
    rollouts: RolloutsConfig
    output: OutputConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    evaluation: EvaluationConfig | None = None

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        if self.objective.temperature != self.rollouts.temperature:
            yield (
                f"objective.temperature: {self.objective.temperature} differs from "
                f"rollouts.temperature: {self.rollouts.temperature}; log-probabilities are taken "
                "at the temperature that was sampled with: set them equal"
            )
        yield from (f"objective.{fault}" for fault in unused_options(self.objective))
        if self.model.position_embedding_type == "mrope":
            if self.rollouts.engine != "file":
                yield (
                    "model.position_embedding_type: mrope with rollouts.engine: "
                    f"{self.rollouts.engine}: no engine that samples has positions of images yet; "
                    "set rollouts.engine: file"
                )
            if self.evaluation is not None:
                yield (
                    "model.position_embedding_type: mrope with evaluation, which samples from the "
                    "model and has no positions of images yet; remove evaluation"
                )
        yield from self._faults_of_routes()
        yield from self._faults_of_sampling()
        yield from self._faults_of_rewards()
        yield from faults_of_layout(self.training, self.parallel)
        shortest = self.parallel.pad_to_multiple
        if self.training.token_budget < shortest:
            kinds = "tensor- and context" if self.parallel.context_parallel_size > 1 else "tensor"
            yield (
                f"training.token_budget: {self.training.token_budget} is less than a token for "
                f"each of the {shortest} {kinds}-parallel ranks; raise it"
            )
        if self.rollouts.groups_per_step < self.training.optimizer_steps_per_rollout:
            yield (
                "training.optimizer_steps_per_rollout: "
                f"{self.training.optimizer_steps_per_rollout} exceeds rollouts.groups_per_step: "
                f"{self.rollouts.groups_per_step}; each optimizer step needs a group"
            )
        steps = self.training.optimizer_steps
        if self.optimizer.lr_decay_steps is None and self.optimizer.lr_warmup_steps > steps:
            yield (
                f"optimizer.lr_warmup_steps: {self.optimizer.lr_warmup_steps} exceeds the {steps} "
                f"optimizer steps of the run (training.steps: {self.training.steps}); lower it, or "
                "set optimizer.lr_decay_steps where the run is to go on later"
            )

    def _faults_of_routes(self) -> Iterator[str]:
        kind = self.training.replayed_routes
        if kind is None:
            return
        key = f"training.replayed_routes: {kind}"
        engine, server = self.rollouts.engine, self.rollouts.server
        if engine == "openai" and kind != "ignore":
            if server is not None and server.kind not in ("vllm", "sglang"):
                yield (
                    f"{key} with rollouts.server.kind: {server.kind}: only vllm and sglang give "
                    "routes; set it to null"
                )
            if self.rollouts.agent is not None:
                yield f"{key} with rollouts.agent: routes of turns are not read; set one to null"
        elif engine != "file":
            yield (
                f"{key} with rollouts.engine: {engine}: only records of engine: file have routes, "
                "and servers of engine: openai (exact, first); set it to null"
            )
        if kind != "ignore" and not self.model.transformer.get("num_moe_experts"):
            yield f"{key} needs a model with experts (model.transformer.num_moe_experts)"
        if kind != "ignore" and self.model.transformer.get("moe_router_fusion"):
            yield (
                f"{key} with model.transformer.moe_router_fusion: true: the fused router chooses "
                "experts by itself; set moe_router_fusion: false"
            )

    def _faults_of_sampling(self) -> Iterator[str]:
        rollouts, model = self.rollouts, self.model
        if self.output.keep_best and self.evaluation is None:
            yield (
                "output.keep_best: true, but there is no evaluation by which a checkpoint is the "
                "best; add the section evaluation, or remove it"
            )
        if self.evaluation is not None:
            if rollouts.agent is not None and self.evaluation.responses_per_prompt > 1:
                yield (
                    "evaluation.responses_per_prompt: "
                    f"{self.evaluation.responses_per_prompt} is not supported with "
                    "rollouts.agent; set it to 1"
                )
            for name in ("reward", "max_response_length"):
                is_given = name == "reward" and rollouts.agent is not None
                if getattr(rollouts, name) is None and not is_given:
                    yield f"rollouts.{name}: required by evaluation"
        length = rollouts.max_response_length
        if length is not None and length >= model.max_sequence_length:
            yield (
                f"rollouts.max_response_length: {length} leaves no room for a prompt within "
                f"model.max_sequence_length: {model.max_sequence_length}; lower it"
            )
        for token in rollouts.stop_tokens:
            if not 0 <= token < model.vocab_size:
                yield (
                    f"rollouts.stop_tokens: {token} is outside the vocabulary of "
                    f"{model.vocab_size} (0 to {model.vocab_size - 1})"
                )

    def _faults_of_rewards(self) -> Iterator[str]:
        weights, reward = self.objective.reward_weights, self.rollouts.reward
        if weights is None:
            if isinstance(reward, dict):
                yield (
                    "objective.reward_weights: required by rollouts.reward, which names several; "
                    f"give a weight for each of {', '.join(reward)}"
                )
            return
        if self.rollouts.agent is not None:
            yield (
                "objective.reward_weights: set, but with rollouts.agent the environment gives one "
                "reward; remove it"
            )
        elif isinstance(reward, str):
            yield (
                f"rollouts.reward: {reward} is one reward, but objective.reward_weights weighs "
                f"rewards by name; set rollouts.reward: {{{next(iter(weights))}: {reward}}}, or "
                "remove objective.reward_weights"
            )
        elif reward is not None:
            for name in sorted(weights.keys() ^ reward.keys()):
                missing = "rollouts.reward" if name in weights else "objective.reward_weights"
                yield f"{missing}: {name} is missing; both have the same names"


def config_summary(config: RunConfig) -> dict[str, Any]:
    """The config as plain values, for logs and checkpoints."""
    return dataclasses.asdict(config)
