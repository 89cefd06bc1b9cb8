"""The typed configuration of a run: what a YAML file may say, with every combination checked.

Nothing here touches a process group or a GPU: a wrong file fails before anything starts. Names are
Megatron's where Megatron has one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_prefix.attention.kernels import kernel_names
from megatron_prefix.objective.config import ObjectiveConfig
from megatron_prefix.rollouts.config import (
    RewardProcessConfig,
    ServerConfig,
    TextConfig,
    WeightsConfig,
)
from megatron_prefix.training.config_loader import ConfigError, load_yaml


def _at_least(section: Any, least: int, *names: str) -> None:
    """Refuse the first of the fields that is below `least`; None is no value."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{name}: {value} must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN's scaling of the rotary frequencies (arXiv 2309.00071)."""

    rotary_scaling_factor: float
    """Longest position over `original_max_position_embeddings`."""
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    correction_range_round_to_int: bool = True


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The GPTModel to build."""

    vocab_size: int
    """Tokens of the vocabulary, before padding."""
    max_sequence_length: int
    """Longest prompt plus response, in tokens."""
    position_embedding_type: Literal["rope", "yarn", "learned_absolute", "none"] = "rope"
    rotary_percent: float = 1.0
    """Part of each head that is rotated."""
    rotary_base: int = 10000
    rope_scaling: bool = False
    """Llama 3's scaling of the rotary frequencies."""
    rope_scaling_factor: float = 8.0
    yarn: YarnConfig | None = None
    """Required by position_embedding_type: yarn."""
    share_embeddings_and_output_weights: bool = False
    """Tie the output layer to the word embedding."""
    make_vocab_size_divisible_by: int = 1
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""
    activation: Literal["gelu", "silu", "relu", "squared_relu"] = "silu"
    """The MLP's activation; with `gated_linear_unit: true`, silu makes SwiGLU."""
    transformer: dict[str, Any] = field(default_factory=dict)
    """Any other field of Megatron's `TransformerConfig`: num_layers, hidden_size, ..."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "vocab_size", "make_vocab_size_divisible_by")
        # One position predicts, another is predicted.
        _at_least(self, 2, "max_sequence_length")
        if not 0 < self.rotary_percent <= 1:
            raise ConfigError(f"rotary_percent: {self.rotary_percent} must be in (0, 1]")
        if (self.position_embedding_type == "yarn") != (self.yarn is not None):
            raise ConfigError(
                f"yarn: {self.yarn} does not go with position_embedding_type: "
                f"{self.position_embedding_type}; give both or neither"
            )

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """The vocabulary that the embedding is built for."""
        multiple = self.make_vocab_size_divisible_by * tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is laid out; the data-parallel size is what remains of the world."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    """Ranks that a packed row is distributed over; `model.transformer.cp_comm_type` says how they
    communicate."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline rank (interleaved schedule)."""
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    """Ranks that each expert is split over; null: 1 with expert parallelism, as many as tensor
    parallel without."""
    sequence_parallel: bool | None = None
    """Shard the row over tensor-parallel ranks between layers; null: when tensor parallel."""

    def __post_init__(self) -> None:
        _at_least(
            self,
            1,
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
        )
        chunks = self.virtual_pipeline_model_parallel_size
        if chunks is not None and chunks < 1:
            raise ConfigError(
                f"virtual_pipeline_model_parallel_size: {chunks} must be at least 1, or null"
            )
        split = self.expert_tensor_parallel_size
        if split is not None and split < 1:
            raise ConfigError(f"expert_tensor_parallel_size: {split} must be at least 1, or null")
        tensor = self.tensor_model_parallel_size
        if split not in (None, tensor) and self.expert_model_parallel_size == 1:
            # It takes their parameters for a dense layer's: ranks are missing from their sums.
            raise ConfigError(
                f"expert_tensor_parallel_size: {split} with tensor_model_parallel_size: {tensor} "
                "and expert_model_parallel_size: 1 gives wrong gradients in Megatron-Core; set it "
                "to null, or spread the experts (expert_model_parallel_size)"
            )
        if self.num_model_chunks > 1 and self.pipeline_model_parallel_size == 1:
            raise ConfigError(
                f"virtual_pipeline_model_parallel_size: {chunks} needs "
                "pipeline_model_parallel_size of at least 2; set it, or set this to null"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "sequence_parallel: true needs tensor_model_parallel_size of at least 2; set it, "
                "or set this to null"
            )

    @property
    def num_model_chunks(self) -> int:
        """Model chunks per pipeline rank, 1 without interleaving."""
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def expert_split(self) -> int:
        """`expert_tensor_parallel_size`, resolved."""
        if self.expert_tensor_parallel_size is not None:
            return self.expert_tensor_parallel_size
        return 1 if self.expert_model_parallel_size > 1 else self.tensor_model_parallel_size

    @property
    def uses_sequence_parallel(self) -> bool:
        """`sequence_parallel`, resolved."""
        if self.sequence_parallel is None:
            return self.tensor_model_parallel_size > 1
        return self.sequence_parallel

    @property
    def pad_to_multiple(self) -> int:
        """What the length of a packed row must be a multiple of."""
        tensor = self.tensor_model_parallel_size if self.uses_sequence_parallel else 1
        return self.context_parallel_size * tensor

    @property
    def microbatch_multiple(self) -> int:
        """What the number of microbatches must be a multiple of: the interleaved schedule's."""
        return self.pipeline_model_parallel_size if self.num_model_chunks > 1 else 1

    @property
    def model_parallel_size(self) -> int:
        """Ranks that work on one packed row: tensor, pipeline and context parallel."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    def data_parallel_size(self, world_size: int) -> int:
        """Packed rows that run side by side in a world of `world_size` ranks."""
        if world_size % self.model_parallel_size:
            sizes = "tensor_model_parallel_size x pipeline_model_parallel_size"
            if self.context_parallel_size > 1:
                sizes += " x context_parallel_size"
            raise ConfigError(
                f"parallel: {world_size} processes do not divide by {sizes} = "
                f"{self.model_parallel_size}; start a multiple of it"
            )
        experts, split = self.expert_model_parallel_size, self.expert_tensor_parallel_size or 1
        ranks_of_stage = world_size // self.pipeline_model_parallel_size
        if ranks_of_stage % (experts * split):
            sizes = f"expert_model_parallel_size: {experts}"
            if split > 1:
                sizes += f" x expert_tensor_parallel_size: {split}"
            raise ConfigError(
                f"parallel.{sizes} does not divide the {ranks_of_stage} ranks of a pipeline stage"
            )
        return world_size // self.model_parallel_size


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Adam, its schedule and clipping, by Megatron's optimizer."""

    lr: float = 1e-5
    min_lr: float = 0.0
    lr_warmup_steps: int = 0
    lr_decay_steps: int | None = None
    """Optimizer steps until min_lr; null: the whole run."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    """Largest global norm of the gradient; 0 clips nothing."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer's state over data-parallel ranks."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "lr", "min_lr", "lr_warmup_steps", "weight_decay", "clip_grad")
        _at_least(self, 1, "lr_decay_steps")
        if self.min_lr > self.lr:
            raise ConfigError(f"min_lr: {self.min_lr} exceeds lr: {self.lr}; lower it")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} must be in [0, 1)")
        if not self.adam_eps > 0:
            raise ConfigError(f"adam_eps: {self.adam_eps} must be above 0")


@dataclass(frozen=True, kw_only=True)
class RolloutsConfig:
    """Where groups of responses come from."""

    engine: Literal["file", "embedded", "openai", "hf"] = "file"
    """`file` reads finished rollouts; `embedded` samples from the model being trained, `openai`
    asks a completions server, `hf` generates with Hugging Face transformers in this process."""
    paths: tuple[Path, ...] = ()
    """JSONL or Parquet: rollouts for `file`, prompts (prompt, answer) for the others."""
    groups_per_step: int = 8
    group_size: int | None = None
    """Responses per prompt; checked by `file` where given, required by the others."""
    reward: str | None = None
    """A registered reward or module:function, where records carry an answer and no rewards."""
    reward_process: RewardProcessConfig = field(default_factory=RewardProcessConfig)
    """Where a module:function runs."""
    epochs: int | None = None
    """How often the files may be gone through; null: without end."""
    max_response_length: int | None = None
    """Tokens to sample at most; required by every engine but `file`."""
    temperature: float = 1.0
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    """A response ends with the first of these, which it keeps; none with `text` means the
    tokenizer's end of sequence."""
    text: TextConfig | None = None
    """Prompts, responses and rewards as text; null: all of them are token ids."""
    server: ServerConfig | None = None
    """Required by `openai`."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """How trained weights get to `openai` and `hf`."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ConfigError("paths: none given; name at least one JSONL or Parquet file")
        _at_least(self, 1, "groups_per_step", "group_size", "epochs", "max_response_length")
        if self.engine != "file":
            for name in ("group_size", "max_response_length", "reward"):
                if getattr(self, name) is None:
                    raise ConfigError(f"{name}: required by engine: {self.engine}")
        self._check_server()
        if not self.temperature > 0:
            raise ConfigError(f"temperature: {self.temperature} must be above 0")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: {self.top_p} must be in (0, 1]")

    def _check_server(self) -> None:
        server = self.server
        if (self.engine == "openai") != (server is not None):
            raise ConfigError(
                f"server: {'missing' if server is None else 'set'}, with engine: {self.engine}; "
                "it belongs to engine: openai, and only there"
            )
        if server is None:
            return
        if self.text is None and server.kind in ("transformers", "openai"):
            raise ConfigError(
                f"text: required by server.kind: {server.kind}, which may answer in text only; "
                "set text.tokenizer"
            )
        if server.prefetch and self.weights.max_staleness < 1:
            raise ConfigError(
                "server.prefetch: makes groups a version old, more than weights.max_staleness: "
                f"{self.weights.max_staleness} allows; raise it, or set prefetch: false"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Sampling on prompts that are never trained on."""

    paths: tuple[Path, ...]
    """Prompts (prompt, answer) as JSONL or Parquet."""
    num_prompts: int
    """The first so many prompts of the files."""
    every: int = 0
    """Steps between evaluations; 0: only before the first and after the last step."""
    temperature: float = 0.0
    """0 takes the most likely token."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ConfigError("paths: none given; name at least one JSONL or Parquet file")
        _at_least(self, 1, "num_prompts")
        _at_least(self, 0, "every", "temperature")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The loop."""

    steps: int
    """Rollout batches to train on."""
    token_budget: int
    """Tokens of one microbatch row at most, over all context-parallel ranks together."""
    allow_split: bool = True
    """Split a group over microbatches when it exceeds the budget; its prefix then runs again."""
    sharing: Literal["groups", "everything", "none"] = "groups"
    """What is shared within a microbatch: the prompt of each group; or whatever its sequences have
    in common, such as a system prompt of several groups or equal beginnings of responses; or none,
    to compare with: every response runs its prompt again."""
    trim_last_layer: bool = True
    """The last layer computes queries, attention, projection and MLP only from the first trained
    position of each segment on: nothing depends on others. The result is the same."""
    share_only_where_it_pays: bool = True
    """Pack a group of one, or one whose prompt saves less than the cross attention to it costs, as
    sequences of their own. Results are the same; false shares always."""
    optimizer_steps_per_rollout: int = 1
    """Optimizer steps that a rollout batch is divided into (and repeated, see epochs)."""
    epochs_per_rollout: int = 1
    """How often a rollout batch is trained on."""
    dtype: Literal["float32", "bfloat16", "float64"] = "bfloat16"
    """Of parameters and activations; float64 is for proofs, on the CPU."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in backward: none, core attention, or whole layers."""
    log_prob_chunk_tokens: int = 1024
    """Rows of logits that exist at once in the output layer."""
    seed: int = 1234
    device: Literal["cuda", "cpu"] = "cuda"
    """`cpu` runs Megatron-Core on gloo, for laptops and tests."""
    kernel: str | None = None
    """Attention kernel by name; null: the best for the device."""
    deterministic: bool = False
    """Steps on the same data give the same bits. Attention's backward and Megatron's embedding cost
    more then on a GPU; a kernel that cannot do it is refused where named, and not chosen else. With
    Transformer Engine it also wants NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 in the environment. On the
    CPU it is so in any case."""
    timeout_minutes: float = 10.0
    """A collective that waits longer ends the run with an error."""

    def __post_init__(self) -> None:
        _at_least(
            self,
            1,
            "steps",
            "token_budget",
            "log_prob_chunk_tokens",
            "optimizer_steps_per_rollout",
            "epochs_per_rollout",
        )
        if not self.timeout_minutes > 0:
            raise ConfigError(f"timeout_minutes: {self.timeout_minutes} must be above 0")
        if self.kernel is not None and self.kernel not in kernel_names():
            raise ConfigError(
                f"kernel: there is none named {self.kernel}; choose one of "
                f"{', '.join(kernel_names())}, or null for the best"
            )
        if self.dtype == "float64" and self.device != "cpu":
            raise ConfigError("dtype: float64 runs on device: cpu only; set device: cpu")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run leaves behind."""

    directory: Path
    """Metrics (metrics.jsonl, tensorboard/), checkpoints (checkpoints/), reward curve."""
    save_every: int = 0
    """Steps between checkpoints; 0: only after the last step."""
    save_in_background: bool = True
    """Train on while a checkpoint is written, from a copy of the state in host memory."""
    save_last: bool = True
    keep: int = 2
    """Checkpoints kept; older ones are removed."""
    load: Path | None = None
    """A checkpoint, or a folder whose newest is taken, to start from (weights only): a run's, one
    that tools/convert_checkpoint.py has made of a Hugging Face model, or Megatron-LM's."""
    resume: bool = True
    """Continue from this directory's latest checkpoint where there is one; false starts anew and
    renames the checkpoints that are there to checkpoints.1, .2, ..."""
    tensorboard: bool = True
    plot: bool = True
    """Write reward.png."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "save_every")
        _at_least(self, 1, "keep")


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
        if self.objective.temperature != self.rollouts.temperature:
            raise ConfigError(
                f"objective.temperature: {self.objective.temperature} differs from "
                f"rollouts.temperature: {self.rollouts.temperature}; log-probabilities are taken "
                "at the temperature that was sampled with: set them equal"
            )
        self._check_sampling()
        shortest = self.parallel.pad_to_multiple
        if self.training.token_budget < shortest:
            kinds = "tensor- and context" if self.parallel.context_parallel_size > 1 else "tensor"
            raise ConfigError(
                f"training.token_budget: {self.training.token_budget} is less than a token for "
                f"each of the {shortest} {kinds}-parallel ranks; raise it"
            )
        if self.rollouts.groups_per_step < self.training.optimizer_steps_per_rollout:
            raise ConfigError(
                "training.optimizer_steps_per_rollout: "
                f"{self.training.optimizer_steps_per_rollout} exceeds rollouts.groups_per_step: "
                f"{self.rollouts.groups_per_step}; each optimizer step needs a group"
            )

    def _check_sampling(self) -> None:
        rollouts, model = self.rollouts, self.model
        if self.evaluation is not None:
            for name in ("reward", "max_response_length"):
                if getattr(rollouts, name) is None:
                    raise ConfigError(f"rollouts.{name}: required by evaluation")
        length = rollouts.max_response_length
        if length is not None and length >= model.max_sequence_length:
            raise ConfigError(
                f"rollouts.max_response_length: {length} leaves no room for a prompt within "
                f"model.max_sequence_length: {model.max_sequence_length}; lower it"
            )
        for token in rollouts.stop_tokens:
            if not 0 <= token < model.vocab_size:
                raise ConfigError(
                    f"rollouts.stop_tokens: {token} is outside the vocabulary of "
                    f"{model.vocab_size} (0 to {model.vocab_size - 1})"
                )


def load_run_config(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a run's YAML file; `overrides` are section.key=value.

    Raises:
        ConfigError: an unknown key, wrong type or impossible combination, naming the key, its
            value and what would do.
    """
    config = load_yaml(path, RunConfig, overrides)
    from megatron_prefix.training.model import transformer_config

    transformer_config(config.model, config.parallel, config.training)
    return config


def config_summary(config: RunConfig) -> dict[str, Any]:
    """The config as plain values, for logs and checkpoints."""
    return dataclasses.asdict(config)
