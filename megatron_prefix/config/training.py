"""The `training` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_prefix.attention.kernels import kernel_names
from megatron_prefix.config.bounds import at_least
from megatron_prefix.config.loader import ConfigError


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
        at_least(
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
