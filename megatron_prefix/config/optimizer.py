"""The `optimizer` section."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_prefix.config.bounds import below, refuse


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Adam, its schedule and clipping, by Megatron's optimizer."""

    lr: float = 1e-5
    """Learning rate after the warm-up."""
    min_lr: float = 0.0
    """Learning rate of steps beyond `lr_decay_steps`, unless the style is `constant`."""
    lr_warmup_steps: int = 0
    """Optimizer steps of a linear warm-up, W: step k of them runs at `lr` * k / W. At most
    `lr_decay_steps`."""
    lr_decay_steps: int | None = None
    """Optimizer steps of the whole schedule, warm-up included; a step after them would run at
    `min_lr`. null: all steps of the run (steps * optimizer_steps_per_rollout *
    epochs_per_rollout)."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes from `lr` to `min_lr`; `constant` stays at `lr`."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW) of all parameters but biases and the weights of norms."""
    adam_beta1: float = 0.9
    """Decay of Adam's mean of gradients."""
    adam_beta2: float = 0.95
    """Decay of Adam's mean of squared gradients."""
    adam_eps: float = 1e-8
    """Added to the root of that mean, by which Adam divides."""
    clip_grad: float = 1.0
    """The gradient is scaled down to this global norm; 0 clips nothing."""
    use_distributed_optimizer: bool = True
    """The optimizer's state is sharded over data-parallel ranks."""
    on_resume: Literal["config", "checkpoint"] = "config"
    """Where a resumed run takes learning rates, schedule, weight decay, betas and epsilon from:
    this section, or its checkpoint. With `config` a changed value holds from the next step on, and
    a schedule over the whole run is stretched when training.steps is raised. The schedule goes on
    at its step in both cases, and the log says what differs. `clip_grad` comes from this section
    always. `use_distributed_optimizer` has to be that of the checkpoint."""

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        yield from below(self, 0, "lr", "min_lr", "lr_warmup_steps", "weight_decay", "clip_grad")
        yield from below(self, 1, "lr_decay_steps")
        if self.min_lr > self.lr:
            yield f"min_lr: {self.min_lr} exceeds lr: {self.lr}; lower it"
        if self.lr_decay_steps is not None and self.lr_warmup_steps > self.lr_decay_steps:
            yield (
                f"lr_warmup_steps: {self.lr_warmup_steps} exceeds lr_decay_steps: "
                f"{self.lr_decay_steps}, which includes the warm-up; lower it"
            )
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name}: {getattr(self, name)} must be in [0, 1)"
        if not self.adam_eps > 0:
            yield f"adam_eps: {self.adam_eps} must be above 0"
