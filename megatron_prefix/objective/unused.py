"""Options that are set and change nothing: a run refuses them."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prefix.objective.config import ObjectiveConfig
from megatron_prefix.objective.losses import OBJECTIVES

_OF_ADVANTAGES = ("advantage", "turn_advantage", "advantage_epsilon", "clip_low", "clip_high")
"""Options of what an objective makes of rewards and ratios."""


def unused_options(config: ObjectiveConfig) -> Iterator[str]:
    """A line for each option that is set and not used, beginning with its name.

    `ObjectiveConfig` itself refuses what would contradict another option; here are those that would
    only do nothing, which `resolved` and `at_step` may leave behind.

    Args:
        config: as the user has written it, not resolved.
    """
    default = ObjectiveConfig()

    def is_set(option: str) -> bool:
        return getattr(config, option) != getattr(default, option)

    objective = OBJECTIVES[config.name]
    found: dict[str, str] = {}
    if not objective.uses_advantages:
        found |= dict.fromkeys(_OF_ADVANTAGES, f"objective.name: {config.name}")
    elif (config.advantage or objective.advantage) != "std":
        found["advantage_epsilon"] = f"advantage: {config.advantage or objective.advantage}"
    if config.kl_coefficient == 0:
        found["kl_estimator"] = "kl_coefficient: 0, which has no reference policy"
    if config.zero_advantages != "resample":
        found["resample_limit"] = f"zero_advantages: {config.zero_advantages}"
    for option, why in found.items():
        if is_set(option):
            yield f"{option}: {getattr(config, option)} is not used with {why}; remove it"
