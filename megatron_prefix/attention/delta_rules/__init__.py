"""What computes the gated delta rule: the registry, and the choice of one."""

from __future__ import annotations

import functools
import logging

import torch

from megatron_prefix.attention.delta_rules.base import DeltaRule, RuleInputs
from megatron_prefix.attention.delta_rules.fla_rule import FlashLinearAttentionRule
from megatron_prefix.attention.delta_rules.torch_rule import TorchRule
from megatron_prefix.attention.kernel_names import delta_rule_names

__all__ = [
    "DeltaRule",
    "FlashLinearAttentionRule",
    "RuleInputs",
    "TorchRule",
    "select_delta_rule",
]

logger = logging.getLogger(__name__)

_RULES: tuple[DeltaRule, ...] = (FlashLinearAttentionRule(), TorchRule())
"""Best first. A new one is one file, one entry here and its name in `kernel_names.py`."""

assert delta_rule_names() == tuple(rule.name for rule in _RULES)


def select_delta_rule(
    name: str | None,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    key_dim: int,
    deterministic: bool = False,
) -> DeltaRule:
    """The rule called `name`, or the best that the inputs allow.

    Args:
        name: one of `delta_rule_names()`, or None for the best.
        device, dtype, key_dim, deterministic: see `RuleInputs`.

    Raises:
        ValueError: the name is unknown, or that rule cannot compute these inputs.

    The first choice for each kind of input is logged, with the reason where a better rule is not
    taken.
    """
    device = torch.device(device)
    inputs = RuleInputs(device=device, dtype=dtype, key_dim=key_dim, deterministic=deterministic)
    reasons = {rule.name: rule.unsupported(inputs) for rule in _RULES}
    if name is not None and name not in reasons:
        raise ValueError(
            f"unknown kernel {name!r} of the delta rule: choose one of "
            f"{', '.join(delta_rule_names())}, or None for the best one"
        )
    if name is not None and reasons[name] is not None:
        raise ValueError(
            f"{name!r} cannot compute the delta rule on {device} in {dtype} with keys of "
            f"{key_dim}: {reasons[name]}. What can: "
            f"{', '.join(n for n, reason in reasons.items() if reason is None)}"
        )
    chosen = name or next(n for n, reason in reasons.items() if reason is None)
    passed = []
    if name is None:
        passed = [f"{n}: {reason}" for n, reason in reasons.items() if reason is not None]
    _log_choice(chosen, device.type, dtype, key_dim, "; ".join(passed))
    return next(rule for rule in _RULES if rule.name == chosen)


@functools.cache
def _log_choice(name: str, device_type: str, dtype: torch.dtype, key_dim: int, passed: str) -> None:
    logger.info(
        "delta rule %s for %s, %s, keys of %d%s",
        name,
        device_type,
        dtype,
        key_dim,
        f" ({passed})" if passed else "",
    )
