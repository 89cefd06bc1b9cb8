"""Losses of routers, by Megatron's own functions on the logits of whole sequences.

Megatron's routers take means over what runs in one forward. The reference runs one sequence at a
time, so its routers have no losses of their own; their logits are kept, and those of a microbatch's
sequences come together here.

At depth k of multi-token prediction the last k rows of a sequence read no token of it and predict
nothing. They are left out, of the losses and of the counts that move expert biases.
"""

from __future__ import annotations

import itertools
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
from megatron_prefix.megatron.releases import option


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
        depths = _depths_of_routers(model, config)
        for router in depths:
            _count_what_predicts(router, depths[router])
        self._routers: list[_Router] = []
        if z_loss_coeff or coefficients:
            self._routers = [
                _Router(module, z_loss_coeff, coefficients, depths.get(module, range(1)))
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


def _depths_of_routers(model: torch.nn.Module, config: Any) -> dict[TopKRouter, range]:
    """The depths of prediction that each router of an MTP layer runs in, one after the other."""
    layers = model.mtp.layers if config.mtp_num_layers else []
    found = {}
    for index, layer in enumerate(layers, start=1):
        depths = range(index, index + 1)
        if option(config, "mtp_use_repeated_layer"):
            depths = range(1, config.mtp_num_layers + 1)
        found |= {m: depths for m in layer.modules() if isinstance(m, TopKRouter)}
    return found


def _count_what_predicts(router: TopKRouter, depths: range) -> None:
    """Take the rows that predict nothing off the counts of a router."""
    routing, next_depth = router.routing, itertools.cycle(depths)

    def routing_without_last_rows(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        probs, routing_map = routing(*args, **kwargs)
        depth = next(next_depth)
        if router.enable_expert_bias and torch.is_grad_enabled():
            router.local_tokens_per_expert -= routing_map[-depth:].sum(dim=0)
        return probs, routing_map

    router.routing = routing_without_last_rows


class _Router:
    """One router, its logits of the running microbatch, and its counts of the running step."""

    def __init__(
        self,
        router: TopKRouter,
        z_loss_coeff: float,
        coefficients: dict[str, float],
        depths: range,
    ) -> None:
        self.counts: Tensor | float = 0.0
        self.num_counted = 0
        self._router, self._z_loss_coeff, self._coefficients = router, z_loss_coeff, coefficients
        self._depths, self._next_depth = depths, itertools.cycle(depths)
        # By depth; the rows of ranks one after the other.
        self._logits: dict[int, list[Tensor]] = {depth: [] for depth in depths}
        self._rows: dict[int, list[Tensor]] = {depth: [] for depth in depths}
        self._gating = router.gating
        # Megatron's names: it has no auxiliary loss of this type.
        router.gating, router.routing_type = self._keep, "none"

    def _keep(self, hidden: Tensor) -> Tensor:
        logits = self._gating(hidden)
        depth = next(self._next_depth)
        if torch.is_grad_enabled():
            rows = logits.flatten(0, 1)
            self._logits[depth].append(rows[: len(rows) - depth])
        return logits

    def end_row(self) -> None:
        for depth, logits in self._logits.items():
            if logits:
                self._rows[depth].append(torch.cat(logits))
            self._logits[depth] = []

    def of_rows(self) -> Tensor | float:
        # Where a layer runs for every depth, releases that tell its router from others take a mean.
        whole = len(self._depths) if getattr(self._router, "is_mtp_layer", False) else 1
        return sum(self._of_rows_at(depth) for depth in self._depths) / whole

    def _of_rows_at(self, depth: int) -> Tensor | float:
        total: Tensor | float = 0.0
        rows = self._rows[depth]
        for logits in rows:
            total = total + z_loss_func(logits, self._z_loss_coeff)
            scores, counts = self._scores_and_counts(logits)
            # A packed row is one sequence to Megatron, so both kinds are one.
            for kind in ("aux_loss", "seq_aux_loss"):
                total = total + self._balancing(kind, scores, counts, len(logits))
        if "global_aux_loss" in self._coefficients:
            logits = torch.cat(rows)
            scores, counts = self._scores_and_counts(logits)
            # Megatron's counts are float32, whatever the model's dtype.
            self.counts = self.counts + counts.to(torch.float32)
            self.num_counted += 1
            mean = self.counts / self.num_counted
            total = total + self._balancing("global_aux_loss", scores, mean, len(logits))
        self._rows[depth] = []
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
