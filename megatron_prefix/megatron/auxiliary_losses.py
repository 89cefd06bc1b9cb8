"""The load balancing losses that routers of experts have by Megatron's config."""

from __future__ import annotations

from typing import Any, Literal, get_args

AuxiliaryLoss = Literal["aux_loss", "seq_aux_loss", "global_aux_loss"]

AUXILIARY_LOSSES: tuple[AuxiliaryLoss, ...] = get_args(AuxiliaryLoss)


def auxiliary_losses(config: Any) -> dict[AuxiliaryLoss, float]:
    """The coefficient of each auxiliary loss that is on.

    Args:
        config: Megatron's `TransformerConfig`, whose type of load balancing may be a list, with a
            list of coefficients.
    """
    if config.num_moe_experts is None:
        return {}
    kinds, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if not isinstance(kinds, (list, tuple)):
        kinds = [kinds]
    if not isinstance(coefficients, (list, tuple)):
        coefficients = [coefficients] * len(kinds)
    return {
        kind: coefficient
        for kind, coefficient in zip(kinds, coefficients, strict=True)
        if kind in AUXILIARY_LOSSES and coefficient
    }
