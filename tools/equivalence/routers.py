"""Losses of routers, by Megatron's own functions on the logits of whole sequences.

Megatron's routers take means over what runs in one forward. The reference runs one sequence at a
time, so its routers have no losses of their own; their logits are kept, and those of a microbatch's
sequences come together here.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import z_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class RouterLosses:
    """The losses of a model's routers, which it has no longer by itself."""

    def __init__(self, model: torch.nn.Module, config: Any) -> None:
        """Take the losses over.

        Args:
            model: Megatron's own.
            config: its `TransformerConfig`, which it reads the coefficient of the z-loss from.
        """
        self._z_loss_coeff = config.moe_z_loss_coeff or 0.0
        config.moe_z_loss_coeff = None
        self._logits: list[list[Tensor]] = []
        if not self._z_loss_coeff:
            return
        for router in model.modules():
            if isinstance(router, TopKRouter):
                self._logits.append([])
                router.gating = functools.partial(self._keep, router.gating, self._logits[-1])

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._logits)

    @staticmethod
    def _keep(gating: Any, kept: list[Tensor], hidden: Tensor) -> Tensor:
        logits = gating(hidden)
        if torch.is_grad_enabled():
            kept.append(logits.flatten(0, 1))
        return logits

    def of_microbatch(self) -> Tensor | float:
        """The losses of all routers over the sequences that have run since the last call."""
        total: Tensor | float = 0.0
        for kept in self._logits:
            logits = torch.cat(kept)
            kept.clear()
            total = total + z_loss_func(logits, self._z_loss_coeff)
        return total
