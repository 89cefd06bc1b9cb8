"""Megatron's Adam and its learning-rate schedule, from a run's settings."""

from __future__ import annotations

from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_prefix.config import OptimizerSettings
from megatron_prefix.model.build import ModelChunks


def build_optimizer(settings: OptimizerSettings, chunks: ModelChunks) -> MegatronOptimizer:
    """Megatron's optimizer over this rank's model chunks."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=chunks.config.bf16,
        params_dtype=chunks.config.params_dtype,
        use_distributed_optimizer=settings.use_distributed_optimizer,
    )
    return get_megatron_optimizer(config, chunks.wrapped)


def build_scheduler(
    settings: OptimizerSettings, optimizer: MegatronOptimizer, *, total_steps: int
) -> OptimizerParamScheduler:
    """Warm-up and decay, counted in optimizer steps; it sets the optimizer's learning rate."""
    decay_steps = settings.lr_decay_steps or total_steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        # Megatron wants the warm-up to end before the decay does.
        lr_warmup_steps=min(settings.lr_warmup_steps, max(decay_steps - 1, 0)),
        lr_decay_steps=max(decay_steps, 1),
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
