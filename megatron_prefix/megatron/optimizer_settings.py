"""The optimizer settings that Megatron's optimizer and scheduler hold, here and in a checkpoint.

Megatron holds a setting more than once: the scheduler has its own `max_lr`, and so has every
parameter group, whose value wins. Loading a checkpoint replaces both by what was saved. Since
megatron-core 0.19 the parameter groups of a checkpoint are also found by these values, so that a
checkpoint of another learning rate could not be loaded at all. `load_with_settings`
therefore writes the settings that are to be used into both sides before anything is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_prefix.megatron.torch_adam import load_optimizer_state


def warmup_in_megatron(lr_warmup_steps: int, lr: float) -> tuple[int, float]:
    """Megatron's (lr_warmup_steps, init_lr) for a warm-up whose step k runs at lr * k / steps.

    Megatron sets the rate of a step from the number of steps before it: its own warm-up begins with
    a step at init_lr and is followed by the first step at lr. In ours the last step is at lr.
    """
    if lr_warmup_steps <= 1:
        return 0, 0.0
    return lr_warmup_steps - 1, lr / lr_warmup_steps


@dataclass(frozen=True, kw_only=True)
class HeldSettings:
    """The fields of `OptimizerSettings` that a checkpoint brings along, under the same names."""

    lr: float
    min_lr: float
    lr_warmup_steps: int
    lr_decay_steps: int
    lr_decay_style: str
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float

    @classmethod
    def read(
        cls, scheduler: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
    ) -> HeldSettings:
        """From the state of a scheduler and at least one parameter group."""
        beta1, beta2 = groups[0]["betas"]
        warmup = scheduler["lr_warmup_steps"]
        return cls(
            lr=scheduler["max_lr"],
            min_lr=scheduler["min_lr"],
            lr_warmup_steps=warmup + 1 if warmup else 0,
            lr_decay_steps=scheduler["lr_decay_steps"],
            lr_decay_style=scheduler["lr_decay_style"],
            weight_decay=scheduler["end_wd"],
            adam_beta1=beta1,
            adam_beta2=beta2,
            adam_eps=groups[0]["eps"],
        )

    def write(self, groups: Sequence[dict[str, Any]]) -> None:
        """Set parameter groups to these settings; learning rate and decay are the scheduler's."""
        for group in groups:
            group["max_lr"], group["min_lr"] = self.lr, self.min_lr
            group["betas"], group["eps"] = (self.adam_beta1, self.adam_beta2), self.adam_eps

    def changes(self, new: HeldSettings) -> list[str]:
        """`optimizer.lr 0.01 -> 1e-05` for each setting that `new` has otherwise."""
        old_values, new_values = dataclasses.asdict(self), dataclasses.asdict(new)
        if self.lr_decay_style == new.lr_decay_style == "constant":
            del new_values["lr_decay_steps"]  # there is nothing to decay
        return [
            f"optimizer.{name} {old_values[name]} -> {value}"
            for name, value in new_values.items()
            if value != old_values[name]
        ]


def load_with_settings(
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    *,
    saved_optimizer: Any,
    saved_scheduler: Mapping[str, Any],
    keep_saved: bool,
    remaining_steps: int | None = None,
) -> list[str]:
    """Load the state of an optimizer and of its scheduler, but settings only as asked for.

    The schedule goes on with the step that comes next, whichever settings are used.

    Args:
        optimizer: as it was built from a run's configuration.
        saved_optimizer: its saved state; the settings within are changed.
        saved_scheduler: the scheduler's.
        keep_saved: use the settings of the checkpoint, not those of `optimizer` and `scheduler`.
        remaining_steps: optimizer steps that a run still takes whose schedule ends with it; the
            schedule is then as long as what has been taken and these. None: it is as long as that
            of `scheduler`.

    Returns:
        What differs between checkpoint and configuration: see `HeldSettings.changes`, from what
        is not used to what is.
    """
    saved_groups = list(_param_groups(saved_optimizer))
    saved = HeldSettings.read(saved_scheduler, saved_groups)
    configured = HeldSettings.read(scheduler.state_dict(), optimizer.param_groups)
    if remaining_steps is not None:
        length = saved_scheduler["num_steps"] + remaining_steps
        configured = dataclasses.replace(configured, lr_decay_steps=length)
    used, other = (saved, configured) if keep_saved else (configured, saved)
    used.write(saved_groups)
    used.write(optimizer.param_groups)
    load_optimizer_state(optimizer, saved_optimizer)
    warmup, init_lr = warmup_in_megatron(used.lr_warmup_steps, used.lr)
    scheduler.init_lr = init_lr  # the only one of its settings that is not in its state
    scheduler.load_state_dict(
        {
            **saved_scheduler,
            "max_lr": used.lr,
            "min_lr": used.min_lr,
            "lr_warmup_steps": warmup,
            "lr_decay_steps": used.lr_decay_steps,
            "lr_decay_style": used.lr_decay_style,
            "start_wd": used.weight_decay,
            "end_wd": used.weight_decay,
        }
    )
    # Megatron sets the parameter groups before it has read the weight decay.
    scheduler.step(increment=0)
    return other.changes(used)


def _param_groups(state: Any) -> Iterator[dict[str, Any]]:
    """All parameter groups in the state of an optimizer, or of several that are chained."""
    if not isinstance(state, dict):
        return
    for key, value in state.items():
        if key == "param_groups":
            yield from value
        elif key not in ("state", "param_state"):
            yield from _param_groups(value)
