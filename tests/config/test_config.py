"""The rules of a run's configuration, each by what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_prefix.config import (
    EvaluationConfig,
    ModelConfig,
    OptimizerSettings,
    OutputConfig,
    ParallelConfig,
    RolloutsConfig,
    RunConfig,
    TrainingConfig,
    YarnConfig,
)
from megatron_prefix.config.loader import ConfigError, load_dataclass
from megatron_prefix.config.packing import packing_of_run
from megatron_prefix.config.rollouts import AgentConfig, ServerConfig, TextConfig
from megatron_prefix.layout import ModelShape, Packing
from megatron_prefix.objective import ObjectiveConfig

YARN = YarnConfig(rotary_scaling_factor=4.0, original_max_position_embeddings=16)
VALID: dict[type, dict[str, Any]] = {
    ModelConfig: {"vocab_size": 8, "max_sequence_length": 16},
    ParallelConfig: {},
    OptimizerSettings: {},
    RolloutsConfig: {"paths": (Path("a.jsonl"),)},
    EvaluationConfig: {"paths": (Path("a.jsonl"),), "num_prompts": 1},
    TrainingConfig: {"steps": 1, "token_budget": 16},
    OutputConfig: {"directory": Path("out")},
}
EMBEDDED = {"engine": "embedded", "group_size": 2, "max_response_length": 4, "reward": "r"}

WRONG: list[tuple[type, dict[str, Any], str]] = [
    (ModelConfig, {"vocab_size": 0}, "vocab_size: 0 must be at least 1"),
    (ModelConfig, {"max_sequence_length": 1}, "max_sequence_length: 1 must be at least 2"),
    (
        ModelConfig,
        {"make_vocab_size_divisible_by": 0},
        "make_vocab_size_divisible_by: 0 must be at least 1",
    ),
    (ModelConfig, {"rotary_percent": 1.5}, r"rotary_percent: 1.5 must be in \(0, 1\]"),
    (
        ModelConfig,
        {"position_embedding_type": "yarn"},
        "yarn: None does not go with position_embedding_type: yarn; give both or neither",
    ),
    (ModelConfig, {"yarn": YARN}, "does not go with position_embedding_type: rope"),
    *(
        (
            ModelConfig,
            {"qk_norm_all_heads": True, "transformer": {"qk_layernorm": True, **transformer}},
            f"qk_norm_all_heads: true needs transformer.{message}",
        )
        for transformer, message in (
            ({"qk_layernorm": False}, "qk_layernorm: True, and it is False"),
            ({"normalization": "LayerNorm"}, "normalization: RMSNorm, and it is 'LayerNorm'"),
            ({"multi_latent_attention": True}, "multi_latent_attention: False, and it is True"),
        )
    ),
    *(
        (ParallelConfig, {name: 0}, f"{name}: 0 must be at least 1")
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "expert_model_parallel_size",
        )
    ),
    (
        ParallelConfig,
        {"virtual_pipeline_model_parallel_size": 0},
        "virtual_pipeline_model_parallel_size: 0 must be at least 1, or null",
    ),
    (
        ParallelConfig,
        {"virtual_pipeline_model_parallel_size": 2},
        "virtual_pipeline_model_parallel_size: 2 needs pipeline_model_parallel_size of at least 2",
    ),
    (
        ParallelConfig,
        {"sequence_parallel": True},
        "sequence_parallel: true needs tensor_model_parallel_size of at least 2",
    ),
    *(
        (OptimizerSettings, {name: -1}, f"{name}: -1 must be at least 0")
        for name in ("lr", "min_lr", "lr_warmup_steps", "weight_decay", "clip_grad")
    ),
    (OptimizerSettings, {"lr_decay_steps": 0}, "lr_decay_steps: 0 must be at least 1"),
    (
        OptimizerSettings,
        {"lr_warmup_steps": 5, "lr_decay_steps": 4},
        "lr_warmup_steps: 5 exceeds lr_decay_steps: 4, which includes the warm-up; lower it",
    ),
    (OptimizerSettings, {"lr": 0.1, "min_lr": 0.2}, "min_lr: 0.2 exceeds lr: 0.1; lower it"),
    (OptimizerSettings, {"adam_beta1": 1.0}, r"adam_beta1: 1.0 must be in \[0, 1\)"),
    (OptimizerSettings, {"adam_beta2": -0.1}, r"adam_beta2: -0.1 must be in \[0, 1\)"),
    (OptimizerSettings, {"adam_eps": 0.0}, "adam_eps: 0.0 must be above 0"),
    (RolloutsConfig, {"paths": ()}, "paths: none given; name at least one JSONL or Parquet file"),
    *(
        (RolloutsConfig, {name: 0}, f"{name}: 0 must be at least 1")
        for name in ("groups_per_step", "group_size", "epochs", "max_response_length")
    ),
    *(
        (RolloutsConfig, {**EMBEDDED, name: None}, f"{name}: required by engine: embedded")
        for name in ("group_size", "max_response_length", "reward")
    ),
    (RolloutsConfig, {"temperature": 0.0}, "temperature: 0.0 must be above 0"),
    (RolloutsConfig, {"top_p": 1.1}, r"top_p: 1.1 must be in \(0, 1\]"),
    (EvaluationConfig, {"paths": ()}, "paths: none given"),
    (EvaluationConfig, {"num_prompts": 0}, "num_prompts: 0 must be at least 1"),
    (EvaluationConfig, {"every": -1}, "every: -1 must be at least 0"),
    (EvaluationConfig, {"temperature": -0.5}, "temperature: -0.5 must be at least 0"),
    *(
        (TrainingConfig, {name: 0}, f"{name}: 0 must be at least 1")
        for name in (
            "steps",
            "token_budget",
            "log_prob_chunk_tokens",
            "optimizer_steps_per_rollout",
            "epochs_per_rollout",
        )
    ),
    (TrainingConfig, {"timeout_minutes": 0.0}, "timeout_minutes: 0.0 must be above 0"),
    (
        TrainingConfig,
        {"timeout_minutes": 14401.0},
        r"timeout_minutes: 14401.0 must be at most 14400 \(10 days\): .*; lower it",
    ),
    (
        TrainingConfig,
        {"kernel": "flash_attn_4", "device": "cpu"},
        "kernel: flash_attn_4 cannot compute on device: cpu; choose one of torch_cpu, reference",
    ),
    (
        TrainingConfig,
        {"head_dtype": "float32", "dtype": "float64"},
        "head_dtype: float32 is narrower than dtype: float64; set head_dtype: null",
    ),
    (
        TrainingConfig,
        {"delta_rule_kernel": "flash_linear_attention", "device": "cpu"},
        "delta_rule_kernel: flash_linear_attention cannot compute on device: cpu; choose one of "
        "torch, or null",
    ),
    (TrainingConfig, {"delta_rule_kernel": "fast"}, "delta_rule_kernel: there is none named fast"),
    (TrainingConfig, {"kernel": "fast"}, "kernel: there is none named fast; choose one of .*torch"),
    (TrainingConfig, {"dtype": "float64"}, "dtype: float64 runs on device: cpu only"),
    *(
        (
            TrainingConfig,
            {"share_across_microbatches": True, "sharing": sharing},
            f"share_across_microbatches: true with sharing: {sharing}; set sharing: groups, or",
        )
        for sharing in ("everything", "none")
    ),
    (
        TrainingConfig,
        {"share_across_microbatches": True, "allow_split": False},
        "share_across_microbatches: true with allow_split: false, which leaves nothing to share",
    ),
    (OutputConfig, {"save_every": -1}, "save_every: -1 must be at least 0"),
    (OutputConfig, {"keep": 0}, "keep: 0 must be at least 1"),
]


@pytest.mark.parametrize(("section", "changes", "message"), WRONG)
def test_a_section_refuses_what_it_cannot_use(
    section: type, changes: dict[str, Any], message: str
) -> None:
    section(**VALID[section])
    with pytest.raises(ConfigError, match=f"^{message}" if changes.keys() != {"yarn"} else message):
        section(**{**VALID[section], **changes})


SAMPLED = {"max_response_length": 2, "reward": "exact_match"}
WEIGHTED = ObjectiveConfig(reward_weights={"a": 1.0})


def _run(**sections: Any) -> RunConfig:
    values = {
        "model": ModelConfig(**VALID[ModelConfig]),
        "training": TrainingConfig(**VALID[TrainingConfig]),
        "rollouts": RolloutsConfig(**VALID[RolloutsConfig]),
        "output": OutputConfig(**VALID[OutputConfig]),
    }
    return RunConfig(**{**values, **sections})


def _rollouts(**options: Any) -> RolloutsConfig:
    return RolloutsConfig(**{**VALID[RolloutsConfig], **options})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {
                "model": ModelConfig(**VALID[ModelConfig], position_embedding_type="mrope"),
                "rollouts": _rollouts(engine="embedded", group_size=2, **SAMPLED),
            },
            "model.position_embedding_type: mrope with rollouts.engine: embedded: no engine that",
        ),
        (
            {
                "model": ModelConfig(**VALID[ModelConfig], position_embedding_type="mrope"),
                "evaluation": EvaluationConfig(**VALID[EvaluationConfig]),
                "rollouts": _rollouts(**SAMPLED),
            },
            "model.position_embedding_type: mrope with evaluation, which samples from the model",
        ),
        (
            {
                "training": TrainingConfig(**VALID[TrainingConfig], replayed_routes="exact"),
                "rollouts": _rollouts(engine="embedded", group_size=2, **SAMPLED),
            },
            "training.replayed_routes: exact with rollouts.engine: embedded: only records of",
        ),
        (
            {
                "training": TrainingConfig(**VALID[TrainingConfig], replayed_routes="exact"),
                "rollouts": _rollouts(
                    engine="openai",
                    group_size=2,
                    server=ServerConfig(url="http://a:1", kind="openai"),
                    text=TextConfig(tokenizer="t"),
                    **SAMPLED,
                ),
            },
            "training.replayed_routes: exact with rollouts.server.kind: openai: only vllm and sgla",
        ),
        (
            {"training": TrainingConfig(**VALID[TrainingConfig], replayed_routes="first")},
            "training.replayed_routes: first needs a model with experts",
        ),
        (
            {"objective": ObjectiveConfig(temperature=0.7)},
            "objective.temperature: 0.7 differs from rollouts.temperature: 1.0; .* set them equal",
        ),
        (
            {
                "rollouts": _rollouts(groups_per_step=2),
                "training": TrainingConfig(steps=1, token_budget=16, optimizer_steps_per_rollout=3),
            },
            "training.optimizer_steps_per_rollout: 3 exceeds rollouts.groups_per_step: 2",
        ),
        (
            {
                "parallel": ParallelConfig(tensor_model_parallel_size=4),
                "training": TrainingConfig(steps=1, token_budget=3),
            },
            "training.token_budget: 3 is less than a token for each of the 4 tensor-parallel ranks",
        ),
        (
            {"evaluation": EvaluationConfig(**VALID[EvaluationConfig])},
            "rollouts.reward: required by evaluation",
        ),
        (
            {
                "evaluation": EvaluationConfig(**VALID[EvaluationConfig]),
                "rollouts": _rollouts(reward="exact_match"),
            },
            "rollouts.max_response_length: required by evaluation",
        ),
        (
            {"rollouts": _rollouts(max_response_length=16)},
            "rollouts.max_response_length: 16 leaves no room for a prompt within "
            "model.max_sequence_length: 16",
        ),
        (
            {
                "training": TrainingConfig(
                    steps=2, token_budget=16, epochs_per_rollout=3, optimizer_steps_per_rollout=1
                ),
                "optimizer": OptimizerSettings(lr_warmup_steps=7),
            },
            r"optimizer.lr_warmup_steps: 7 exceeds the 6 optimizer steps of the run "
            r"\(training.steps: 2\); lower it, or set optimizer.lr_decay_steps",
        ),
        (
            {"rollouts": _rollouts(stop_tokens=(3, 8))},
            r"rollouts.stop_tokens: 8 is outside the vocabulary of 8 \(0 to 7\)",
        ),
        (
            {"objective": ObjectiveConfig(kl_estimator="k2")},
            "objective.kl_estimator: k2 is not used with kl_coefficient: 0",
        ),
        (
            {"rollouts": _rollouts(reward={"a": "numeric", "b": "exact_match"})},
            "objective.reward_weights: required by rollouts.reward, which names several; give a "
            "weight for each of a, b",
        ),
        (
            {"rollouts": _rollouts(reward="numeric"), "objective": WEIGHTED},
            "rollouts.reward: numeric is one reward, but objective.reward_weights weighs rewards "
            r"by name; set rollouts.reward: \{a: numeric\}, or remove",
        ),
        (
            {"rollouts": _rollouts(reward={"b": "numeric"}), "objective": WEIGHTED},
            "rollouts.reward: a is missing; both have the same names\n"
            "objective.reward_weights: b is missing; both have the same names$",
        ),
        (
            {
                "rollouts": _rollouts(
                    engine="openai",
                    group_size=2,
                    max_response_length=4,
                    text=TextConfig(tokenizer="t"),
                    server=ServerConfig(url="http://s"),
                    agent=AgentConfig(environment="m:f"),
                ),
                "objective": WEIGHTED,
            },
            "objective.reward_weights: set, but with rollouts.agent the environment gives one",
        ),
    ],
)
def test_sections_that_do_not_go_together_are_refused(
    sections: dict[str, Any], message: str
) -> None:
    _run()
    with pytest.raises(ConfigError, match=f"^{message}"):
        _run(**sections)


ACROSS = TrainingConfig(steps=1, token_budget=16, share_across_microbatches=True)


@pytest.mark.parametrize(
    "name",
    ["pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size"],
)
def test_a_prompt_is_not_shared_across_microbatches_where_ranks_would_have_to_wait(
    name: str,
) -> None:
    message = (
        rf"^training\.share_across_microbatches: true with parallel\.{name}: 2 is not supported "
        rf"yet \(.*\); set share_across_microbatches: false, or {name}: 1$"
    )
    allowed, refused = ParallelConfig(tensor_model_parallel_size=2), ParallelConfig(**{name: 2})
    _run(training=ACROSS, parallel=allowed)
    _packing(ACROSS, allowed)
    with pytest.raises(ConfigError, match=message):
        _run(training=ACROSS, parallel=refused)
    with pytest.raises(ConfigError, match=message):
        _packing(ACROSS, refused)
    _packing(TrainingConfig(**VALID[TrainingConfig]), refused)


def _packing(training: TrainingConfig, parallel: ParallelConfig) -> Packing:
    shape = ModelShape(
        num_layers=1,
        hidden_size=8,
        ffn_hidden_size=8,
        num_attention_heads=1,
        num_query_groups=1,
        kv_channels=8,
        vocab_size=8,
        gated_linear_unit=True,
    )
    return packing_of_run(training, parallel, model_shape=shape, data_parallel_size=2)


def test_the_data_parallel_size_is_what_remains_of_the_world() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert parallel.data_parallel_size(8) == 2
    with pytest.raises(ConfigError, match=r"parallel: 6 processes do not divide by .* = 4; start"):
        parallel.data_parallel_size(6)
    experts = ParallelConfig(expert_model_parallel_size=4)
    assert experts.data_parallel_size(4) == 4
    with pytest.raises(ConfigError, match=r"expert_model_parallel_size: 4 does not divide the 2"):
        experts.data_parallel_size(2)
    split = ParallelConfig(expert_model_parallel_size=2, expert_tensor_parallel_size=2)
    assert split.data_parallel_size(4) == 4
    with pytest.raises(ConfigError, match=r"2 x expert_tensor_parallel_size: 2 does not divide"):
        split.data_parallel_size(2)


def test_experts_are_whole_with_expert_parallelism_unless_said_otherwise() -> None:
    assert ParallelConfig(tensor_model_parallel_size=2).expert_split == 2
    both = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}
    assert ParallelConfig(**both).expert_split == 1
    assert ParallelConfig(**both, expert_tensor_parallel_size=2).expert_split == 2
    with pytest.raises(ConfigError, match=r"^expert_tensor_parallel_size: 0 must be at least 1"):
        ParallelConfig(expert_tensor_parallel_size=0)
    with pytest.raises(ConfigError, match=r"^expert_tensor_parallel_size: 1 .*wrong gradients"):
        ParallelConfig(tensor_model_parallel_size=2, expert_tensor_parallel_size=1)


def test_sequence_parallelism_comes_with_tensor_parallelism_unless_said_otherwise() -> None:
    assert not ParallelConfig().uses_sequence_parallel
    assert ParallelConfig(tensor_model_parallel_size=2).uses_sequence_parallel
    off = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=False)
    assert not off.uses_sequence_parallel


def test_the_vocabulary_is_padded_for_its_tensor_parallel_shards() -> None:
    model = ModelConfig(vocab_size=61, max_sequence_length=16, make_vocab_size_divisible_by=8)
    assert model.padded_vocab_size(1) == 64
    assert model.padded_vocab_size(4) == 64
    assert model.padded_vocab_size(3) == 72


def test_a_rule_names_the_whole_key_of_the_file() -> None:
    values = {
        "model": {"vocab_size": 8, "max_sequence_length": 16},
        "training": {"steps": 1, "token_budget": 16},
        "rollouts": {"paths": ["a.jsonl"]},
        "output": {"directory": "out", "keep": 0},
    }
    with pytest.raises(ConfigError, match=r"^output\.keep: 0 must be at least 1"):
        load_dataclass(RunConfig, values)
