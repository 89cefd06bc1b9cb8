"""The `optimizer` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_prefix.config.bounds import at_least
from megatron_prefix.config.loader import ConfigError


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
        at_least(self, 0, "lr", "min_lr", "lr_warmup_steps", "weight_decay", "clip_grad")
        at_least(self, 1, "lr_decay_steps")
        if self.min_lr > self.lr:
            raise ConfigError(f"min_lr: {self.min_lr} exceeds lr: {self.lr}; lower it")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} must be in [0, 1)")
        if not self.adam_eps > 0:
            raise ConfigError(f"adam_eps: {self.adam_eps} must be above 0")
