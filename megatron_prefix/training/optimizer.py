"""Megatron's Adam and its learning-rate schedule, from a run's settings."""

from __future__ import annotations

import dataclasses
import logging

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_prefix.config import OptimizerSettings
from megatron_prefix.megatron.optimizer_settings import HeldSettings, warmup_in_megatron
from megatron_prefix.model.build import ModelChunks

logger = logging.getLogger(__name__)


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
    """Warm-up and decay, counted in optimizer steps; it sets the rate of the step that comes next.

    Args:
        settings: for the meaning of the schedule's lengths, see `OptimizerSettings`.
        total_steps: optimizer steps of the whole run.

    Raises:
        ValueError: a warm-up that is longer than the schedule.
    """
    decay_steps = settings.lr_decay_steps or total_steps
    if settings.lr_warmup_steps > decay_steps:
        raise ValueError(
            f"optimizer.lr_warmup_steps: {settings.lr_warmup_steps} exceeds the {decay_steps} "
            "optimizer steps of the run; lower it"
        )
    warmup_steps, init_lr = warmup_in_megatron(settings.lr_warmup_steps, settings.lr)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=init_lr,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def warn_of_ended_schedule(scheduler: OptimizerParamScheduler, remaining_steps: int) -> None:
    """Say so where steps that are still to be taken run at the last rate of a decay."""
    if scheduler.lr_decay_style == "constant" or scheduler.num_steps < scheduler.lr_decay_steps:
        return
    if remaining_steps > 0 and dist.get_rank() == 0:
        logger.warning(
            "optimizer.lr_decay_steps: the schedule has ended after %d optimizer steps; the %d "
            "that follow run at min_lr: %g. Raise it to decay over them",
            scheduler.num_steps,
            remaining_steps,
            scheduler.min_lr,
        )


def settings_in_use(
    settings: OptimizerSettings, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
) -> OptimizerSettings:
    """`settings` with what the optimizer and the scheduler hold in place of its own."""
    held = HeldSettings.read(scheduler.state_dict(), optimizer.param_groups)
    return dataclasses.replace(settings, **dataclasses.asdict(held))
