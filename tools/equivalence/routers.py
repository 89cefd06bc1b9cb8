"""Losses of routers, by Megatron's own functions on the logits of whole sequences.

Megatron's routers take means over what runs in one forward. The reference runs one sequence at a
time, so its routers have no losses of their own; their logits are kept, and those of a microbatch's
sequences come together here.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    switch_load_balancing_loss_func,
    z_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_prefix.megatron.auxiliary_losses import auxiliary_losses


class RouterLosses:
    """The losses of a model's routers, which it has no longer by itself."""

    def __init__(self, model: torch.nn.Module, config: Any) -> None:
        """Take the losses over.

        Args:
            model: Megatron's own.
            config: its `TransformerConfig`, which it reads the coefficient of the z-loss from.
        """
        z_loss_coeff, coefficients = config.moe_z_loss_coeff or 0.0, auxiliary_losses(config)
        config.moe_z_loss_coeff = None
        self._routers: list[_Router] = []
        if z_loss_coeff or coefficients:
            self._routers = [
                _Router(module, z_loss_coeff, coefficients)
                for module in model.modules()
                if isinstance(module, TopKRouter)
            ]

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._routers)

    def end_row(self) -> None:
        """The sequences that have run since the last call are a data-parallel rank's microbatch."""
        for router in self._routers:
            router.end_row()

    def of_rows(self) -> Tensor | float:
        """The sum over ranks of the losses of all routers, for the rows since the last call."""
        return sum(router.of_rows() for router in self._routers)

    def end_step(self) -> None:
        """Begin to count anew for the global auxiliary loss."""
        for router in self._routers:
            router.counts, router.num_counted = 0.0, 0


class _Router:
    """One router, its logits of the running microbatch, and its counts of the running step."""

    def __init__(
        self, router: TopKRouter, z_loss_coeff: float, coefficients: dict[str, float]
    ) -> None:
        self.counts: Tensor | float = 0.0
        self.num_counted = 0
        self._router, self._z_loss_coeff, self._coefficients = router, z_loss_coeff, coefficients
        self._logits: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._gating = router.gating
        # Megatron's names: it has no auxiliary loss of this type.
        router.gating, router.routing_type = self._keep, "none"

    def _keep(self, hidden: Tensor) -> Tensor:
        logits = self._gating(hidden)
        if torch.is_grad_enabled():
            self._logits.append(logits.flatten(0, 1))
        return logits

    def end_row(self) -> None:
        if self._logits:
            self._rows.append(torch.cat(self._logits))
        self._logits = []

    def of_rows(self) -> Tensor | float:
        total: Tensor | float = 0.0
        for logits in self._rows:
            total = total + z_loss_func(logits, self._z_loss_coeff)
            scores, counts = self._scores_and_counts(logits)
            # A packed row is one sequence to Megatron, so both kinds are one.
            for kind in ("aux_loss", "seq_aux_loss"):
                total = total + self._balancing(kind, scores, counts, len(logits))
        if "global_aux_loss" in self._coefficients:
            logits = torch.cat(self._rows)
            scores, counts = self._scores_and_counts(logits)
            # Megatron's counts are float32, whatever the model's dtype.
            self.counts = self.counts + counts.to(torch.float32)
            self.num_counted += 1
            mean = self.counts / self.num_counted
            total = total + self._balancing("global_aux_loss", scores, mean, len(logits))
        self._rows = []
        return total

    def _scores_and_counts(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        router = self._router
        routing_map, scores = compute_routing_scores_for_aux_loss(
            logits, router.topk, router.score_function
        )
        return scores, routing_map.sum(dim=0)

    def _balancing(
        self, kind: str, scores: Tensor, counts: Tensor, num_tokens: int
    ) -> Tensor | float:
        if kind not in self._coefficients:
            return 0.0
        return switch_load_balancing_loss_func(
            probs=scores,
            tokens_per_expert=counts,
            total_num_tokens=num_tokens,
            topk=self._router.topk,
            num_experts=self._router.config.num_moe_experts,
            moe_aux_loss_coeff=self._coefficients[kind],
        )
