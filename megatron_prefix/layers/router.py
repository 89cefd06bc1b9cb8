"""What routers of experts learn from all tokens, a token counted once for each of its sequences.

Megatron counts how many tokens each expert gets, and moves the expert bias by these counts. Losses
of its routers are means over the tokens of a microbatch. A shared token stands in the row once; of
repeated prompts it would be counted once for each sequence. So tokens are weighted by their
multiplicity m, which is 0 on padding. N is the sum of m over the microbatch, E the experts, k how
many of them a token gets:

    counts     c_e = sum over tokens of m, for those that expert e gets
    z-loss     1/N * sum over tokens of m * logsumexp(logits)^2    (arXiv 2202.08906, equation 5)
    auxiliary  E / (k N^2) * sum over experts of c_e * (sum over tokens of m * score)
                                                                   (arXiv 2101.03961, equation 4)

The auxiliary loss of sequences (`seq_aux_loss`) is the same, since to Megatron a packed row is one
sequence. The global one has, in place of c_e, the mean over the microbatches of the step so far, of
the counts on all data-parallel ranks; and their N.

In the layers of multi-token prediction a row counts as often as a token is predicted from it, and N
is the number of these predictions. (Megatron counts the last k rows of each sequence at depth k
too, which read token 0 and predict nothing.)

Ranks that hold parts of a row have parts of the sums over tokens, whose gradients Megatron adds up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams, RouterLossScale
from megatron_prefix.megatron.auxiliary_losses import AuxiliaryLoss, auxiliary_losses
from megatron_prefix.megatron.borrowed import (
    auxiliary_loss_by,
    routing_followed_by,
    z_loss_by,
)
from megatron_prefix.megatron.releases import option


def has_statistics(config: Any) -> bool:
    """Whether routers of a model learn from all tokens, not only from what follows them.

    Args:
        config: Megatron's `TransformerConfig`.
    """
    return _bias_moves(config) or bool(config.moe_z_loss_coeff or auxiliary_losses(config))


def _bias_moves(config: Any) -> bool:
    return bool(config.moe_router_enable_expert_bias and config.moe_router_bias_update_rate)


def collects_statistics(layer: Any) -> bool:
    """Whether a transformer layer has experts whose router learns from all tokens."""
    return has_statistics(layer.config) and router_of(layer) is not None


def router_of(layer: Any) -> TopKRouter | None:
    """The router of a layer, also where an adapter (LoRA) wraps it."""
    return next((m for m in layer.mlp.modules() if isinstance(m, TopKRouter)), None)


def own_rows(values: Tensor, config: Any) -> Tensor:
    """[T, ...] of a row's tokens -> of those that a router gets: under sequence parallelism the
    part of this tensor-parallel rank."""
    if not config.sequence_parallel:
        return values
    size = parallel_state.get_tensor_model_parallel_world_size()
    return values.tensor_split(size)[parallel_state.get_tensor_model_parallel_rank()]


@contextlib.contextmanager
def counting_by_multiplicity(layer: Any, params: PrefixPackedSeqParams) -> Iterator[None]:
    """Within the block, the layer's router counts the rows of a batch by their multiplicity.

    Args:
        layer: that collects statistics.
        params: of the batch; the layer runs all of its rows.

    Raises:
        ValueError: the router has losses and is in training, but the params have no scale for them.
    """
    assert params.multiplicity is not None and params.query_rows is None
    config, router, multiplicity = layer.config, router_of(layer), params.multiplicity
    assert router is not None
    weighted = _WeightedRouter(
        router=router,
        multiplicity=own_rows(multiplicity, config)[:, None],
        scale=params.router_losses,
    )
    with contextlib.ExitStack() as lent:
        if _bias_moves(config):
            lent.enter_context(routing_followed_by(router, weighted.count_repeated))
        if config.moe_z_loss_coeff:
            lent.enter_context(z_loss_by(router, weighted.z_loss))
        for kind in auxiliary_losses(config):
            loss = functools.partial(weighted.auxiliary_loss, kind)
            lent.enter_context(auxiliary_loss_by(router, kind, loss))
        yield


@dataclass(frozen=True, kw_only=True, eq=False)
class _WeightedRouter:
    """A router and how often each of its T rows counts. Its methods stand in for the router's."""

    router: TopKRouter
    multiplicity: Tensor
    """[T, 1] int64"""
    scale: RouterLossScale | None

    @torch.no_grad()
    def count_repeated(self, routing_map: Tensor) -> None:
        """Add to the counts of a map [T, E], of which Megatron has counted every row once."""
        # Whole numbers, which float32 holds up to 2^24.
        self.router.local_tokens_per_expert += (routing_map * (self.multiplicity - 1)).sum(dim=0)

    def z_loss(self, logits: Tensor) -> Tensor:
        """logits [T, E] -> this rank's part."""
        scale = self._known_scale("moe_z_loss_coeff")
        squares = torch.logsumexp(logits, dim=-1, keepdim=True).square()
        factor = self.router.config.moe_z_loss_coeff * scale.factor / scale.num_tokens
        return (squares * self.multiplicity).sum() * factor

    def auxiliary_loss(self, kind: AuxiliaryLoss, scores: Tensor, routing_map: Tensor) -> Tensor:
        """scores [T, E], and the map [T, E] that follows from them -> this rank's part."""
        router, scale = self.router, self._known_scale("moe_aux_loss_coeff")
        counts = self._counts(routing_map, on_all_ranks=kind == "global_aux_loss")
        num_tokens: int | Tensor = scale.num_tokens
        if kind == "global_aux_loss":
            num_tokens = (counts.sum() / router.topk).clamp(min=1)
            # Megatron's own sums, which it sets to 0 after each step.
            router.global_tokens_per_expert += counts
            router.ga_steps += 1
            counts = router.global_tokens_per_expert / router.ga_steps
        factor = router.get_aux_loss_coeff(kind) * scale.factor * router.config.num_moe_experts
        total = ((scores * self.multiplicity).sum(dim=0) * counts).sum()
        return total * (factor / (router.topk * num_tokens * num_tokens))

    @torch.no_grad()
    def _counts(self, routing_map: Tensor, *, on_all_ranks: bool) -> Tensor:
        """[E] int64: of the whole row, or of the rows of all data-parallel ranks."""
        router = self.router
        if router.config.sequence_parallel:
            group = router.tp_dp_cp_group if on_all_ranks else router.tp_cp_group
        elif on_all_ranks:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        else:
            group = parallel_state.get_context_parallel_group()
        counts = (routing_map * self.multiplicity).sum(dim=0)
        dist.all_reduce(counts, group=group)
        return counts

    def _known_scale(self, coefficient: str) -> RouterLossScale:
        if self.scale is None:
            raise ValueError(
                f"the model's routers have losses ({coefficient}), and PrefixPackedSeqParams has "
                "no router_losses to scale them by. Give from_layout "
                "router_losses=RouterLossScale(...)"
            )
        config = self.router.config
        if option(config, "mtp_use_repeated_layer") and getattr(self.router, "is_mtp_layer", False):
            # A layer that runs for every depth: releases that tell it from others take the mean.
            return dataclasses.replace(self.scale, factor=self.scale.factor / config.mtp_num_layers)
        return self.scale
