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
    """Learning rate at the end of the decay."""
    lr_warmup_steps: int = 0
    """Optimizer steps in which the learning rate rises to `lr`."""
    lr_decay_steps: int | None = None
    """Optimizer steps until the learning rate is `min_lr`; null: all steps of the run."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes from `lr` to `min_lr`; `constant` stays at `lr`."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
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

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        yield from below(self, 0, "lr", "min_lr", "lr_warmup_steps", "weight_decay", "clip_grad")
        yield from below(self, 1, "lr_decay_steps")
        if self.min_lr > self.lr:
            yield f"min_lr: {self.min_lr} exceeds lr: {self.lr}; lower it"
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name}: {getattr(self, name)} must be in [0, 1)"
        if not self.adam_eps > 0:
            yield f"adam_eps: {self.adam_eps} must be above 0"
