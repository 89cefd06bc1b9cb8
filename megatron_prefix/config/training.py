"""The `training` section."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_prefix.attention.kernel_names import (
    cpu_delta_rule_names,
    cpu_kernel_names,
    delta_rule_names,
    kernel_names,
)
from megatron_prefix.config.bounds import below, refuse
from megatron_prefix.config.parallel import ParallelConfig

_MAX_TIMEOUT_MINUTES = 10 * 24 * 60


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training loop."""

    steps: int
    """Steps of the run: rollout batches to train on. An *optimizer* step is an update of the
    weights; a step has `optimizer_steps_per_rollout` x `epochs_per_rollout` of them."""
    token_budget: int
    """Tokens of a microbatch (a packed row) at most, summed over its context-parallel ranks."""
    allow_split: bool = True
    """A group that exceeds the budget is split over microbatches, each of which runs the prefix;
    false: such a group is an error."""
    sharing: Literal["groups", "everything", "none"] = "groups"
    """What sequences of a microbatch share. `groups`: each group its prompt, and turns that its
    responses agree in, where that pays. `everything`: all common beginnings, such as a system
    prompt of several groups. `none`: nothing, every response runs its prompt again; it is there to
    compare with."""
    trim_last_layer: bool = True
    """The last layer computes queries, attention, projection and MLP only from the first trained
    position of each segment on, since no result depends on earlier rows."""
    share_only_where_it_pays: bool = True
    """A group whose prompt saves less than attention to it costs, such as a group of a single
    response, is packed as sequences of their own. Results are the same; false shares always."""
    share_across_microbatches: bool = False
    """The pieces of a group that exceeds the budget follow one another on their rank and run the
    prompt once, where that makes the busiest rank less busy; each layer's keys and values of the
    prompt, or its state, are kept until the last piece is done. Not with pipeline, context or
    expert parallelism."""
    replayed_routes: Literal["exact", "first", "ignore"] | None = None
    """What becomes of the experts that records of `file` (`routed_experts`) or a server of kind
    vllm or sglang say tokens were sent to. `exact`: the policy's routers send each token there;
    responses share their prompt as far as its routes agree. `first`: the same, but the prompt of a
    group has the routes of its first response, so that it is shared whole: that is another run than
    one without sharing. `ignore`: the routers choose. null: records must have none. Not before
    megatron-core 0.16."""
    optimizer_steps_per_rollout: int = 1
    """Optimizer steps that a rollout batch is divided into, in each of its epochs."""
    epochs_per_rollout: int = 1
    """How often each rollout batch is trained on."""
    dtype: Literal["float32", "bfloat16", "float64"] = "bfloat16"
    """Type of parameters and activations; float64 is for proofs, on the CPU."""
    head_dtype: Literal["float32"] | None = None
    """Type of the output layer's matrix products, forward and backward; null: `dtype`. With
    `float32` and `dtype: bfloat16`, logits are not rounded to bfloat16 before log-probabilities are
    taken from them, and sampling in this process draws from the same logits. Its weights stay in
    `dtype`."""
    detach_mtp: bool = True
    """The loss of multi-token prediction (`model.transformer.mtp_num_layers`, times
    `mtp_loss_scaling_factor`) trains its own layers alone; false: the other layers, the embedding
    and the output layer too. Models without it do not read this."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again, to save memory: nothing, core attention, or whole layers."""
    log_prob_chunk_tokens: int = 1024
    """Rows of logits that are in memory at a time."""
    seed: int = 1234
    """Of random weights, of sampling and of the order of prompts."""
    device: Literal["cuda", "cpu"] = "cuda"
    """`cpu` runs Megatron-Core without a GPU, on gloo, for laptops and tests."""
    kernel: str | None = None
    """Name of the attention kernel; null: the best for the device."""
    delta_rule_kernel: str | None = None
    """Name of what computes the delta rule: `torch`, or on a GPU `flash_linear_attention`; null:
    the best for the device. Models without gated delta nets do not read this."""
    deterministic: bool = False
    """Steps on the same data give the same bits, which costs time on a GPU. A kernel that cannot do
    it is not chosen, and refused if it is named. With Transformer Engine,
    `NVTE_ALLOW_NONDETERMINISTIC_ALGO=0` has to be in the environment. On the CPU the bits are the
    same in any case."""
    peak_tflops: float | None = None
    """TFLOP/s that one GPU reaches at most in `dtype`, such as 989 for an H100 in bfloat16; with
    it, steps report the model FLOPs utilisation `mfu`. null: they do not."""
    timeout_minutes: float = 10.0
    """Minutes after which a collective that waits ends the run with an error; 14400 (10 days) at
    most."""

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.optimizer_steps_of(self.steps)

    def optimizer_steps_of(self, rollout_batches: int) -> int:
        """Optimizer steps on so many rollout batches."""
        return rollout_batches * self.optimizer_steps_per_rollout * self.epochs_per_rollout

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        yield from below(
            self,
            1,
            "steps",
            "token_budget",
            "log_prob_chunk_tokens",
            "optimizer_steps_per_rollout",
            "epochs_per_rollout",
        )
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            yield f"peak_tflops: {self.peak_tflops} must be above 0"
        if not self.timeout_minutes > 0:
            yield f"timeout_minutes: {self.timeout_minutes} must be above 0"
        elif self.timeout_minutes > _MAX_TIMEOUT_MINUTES:
            yield (
                f"timeout_minutes: {self.timeout_minutes} must be at most {_MAX_TIMEOUT_MINUTES} "
                "(10 days): a run whose processes wait for each other longer has hung, and no "
                "error would ever say so; lower it"
            )
        for option, name, names, on_cpu in (
            ("kernel", self.kernel, kernel_names(), cpu_kernel_names()),
            (
                "delta_rule_kernel",
                self.delta_rule_kernel,
                delta_rule_names(),
                cpu_delta_rule_names(),
            ),
        ):
            if name is not None and name not in names:
                yield (
                    f"{option}: there is none named {name}; choose one of {', '.join(names)}, or "
                    "null for the best"
                )
            elif self.device == "cpu" and name not in (None, *on_cpu):
                yield (
                    f"{option}: {name} cannot compute on device: cpu; choose one of "
                    f"{', '.join(on_cpu)}, or null for the best"
                )
        if self.share_across_microbatches:
            if self.sharing != "groups":
                yield (
                    f"share_across_microbatches: true with sharing: {self.sharing}; set sharing: "
                    "groups, or share_across_microbatches: false"
                )
            if not self.allow_split:
                yield (
                    "share_across_microbatches: true with allow_split: false, which leaves nothing "
                    "to share; set one of them otherwise"
                )
        if self.head_dtype is not None and self.dtype == "float64":
            yield (
                f"head_dtype: {self.head_dtype} is narrower than dtype: float64; set head_dtype: "
                "null"
            )
        if self.dtype == "float64" and self.device != "cpu":
            yield "dtype: float64 runs on device: cpu only; set device: cpu"


def faults_of_layout(training: TrainingConfig, parallel: ParallelConfig) -> Iterator[str]:
    """What these two sections do not go together in, a line each."""
    if not training.share_across_microbatches:
        return
    for name, why in (
        ("pipeline_model_parallel_size", "backward of a prompt would have to wait on every stage"),
        ("context_parallel_size", "keys of the prompt are spread over ranks"),
        ("expert_model_parallel_size", "ranks that share experts run equally many microbatches"),
    ):
        if getattr(parallel, name) > 1:
            yield (
                f"training.share_across_microbatches: true with parallel.{name}: "
                f"{getattr(parallel, name)} is not supported yet ({why}); set "
                f"share_across_microbatches: false, or {name}: 1"
            )
