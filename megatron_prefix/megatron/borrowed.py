"""Attributes of Megatron's modules that hold another value for the length of one forward call.

Megatron reads them in the middle of methods that nothing else can reach into. Each function here
names the attribute, why it is lent, and puts it back.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from megatron_prefix.megatron.auxiliary_losses import AuxiliaryLoss


class OneRank:
    """Stands in for a process group of this rank alone."""

    def size(self) -> int:
        """Ranks of the group."""
        return 1

    def rank(self) -> int:
        """Of this process in it."""
        return 0


@contextlib.contextmanager
def row_as_one_sequence(
    attention: Any, params: PackedSeqParams, *, rows: Tensor, query_rows: Tensor | None
) -> Iterator[None]:
    """Within the block, Megatron's rotary embedding takes its table as this rank's row, as it is.

    Megatron asks the self attention's context-parallel group which slice of a table to take. The
    table given here holds the rows of this rank's tokens only, so the group says one rank; the
    self attention reads the group for nothing else. And unless rotary embedding is fused, Megatron
    reads `cu_seqlens` on the host, in every layer, for queries and for keys: on the device that
    would make the host wait each time, so they are lent as host tensors.

    Args:
        attention: a Megatron self attention.
        params: of the batch.
        rows: [T] anything with the length of the keys' rows.
        query_rows: [N] the same for queries; None where they are the keys' rows.
    """
    # `pg_collection` since 0.15, `model_comm_pgs` before.
    name = "pg_collection" if hasattr(attention, "pg_collection") else "model_comm_pgs"
    groups = getattr(attention, name)
    on_device = params.cu_seqlens_q, params.cu_seqlens_kv
    if groups.cp.size() > 1:
        alone = copy.copy(groups)
        alone.cp = OneRank()
        setattr(attention, name, alone)
    if not attention.config.apply_rope_fusion:
        params.cu_seqlens_q, params.cu_seqlens_kv = (
            torch.tensor([0, len(x)], dtype=torch.int32, device="cpu")
            for x in (rows if query_rows is None else query_rows, rows)
        )
    try:
        yield
    finally:
        params.cu_seqlens_q, params.cu_seqlens_kv = on_device
        setattr(attention, name, groups)


@contextlib.contextmanager
def _lent(module: Any, name: str, value: Any) -> Iterator[None]:
    """Within the block, a module's attribute or method holds another value.

    An instance attribute comes before a method of the class, and before a child module.
    """
    nothing = object()
    before = module.__dict__.get(name, nothing)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if before is nothing:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


def residual_through(
    layer: Any, change: Callable[[Tensor], Tensor], *, adding: str = "self_attn_bda"
) -> contextlib.AbstractContextManager[None]:
    """Within the block, a layer adds its attention's output to `change(residual)`.

    Args:
        layer: a Megatron layer.
        change: the residual as the layer has it -> as the attention's output needs it.
        adding: attribute of the layer that makes the function that adds: a plain function as a
            rule, but it may be a module.
    """
    bias_dropout_add = getattr(layer, adding)

    def add_to_changed(training: bool, fused: bool) -> Callable[..., Tensor]:
        add = bias_dropout_add(training, fused)

        def run(output_with_bias: Any, residual: Tensor, dropout: float) -> Tensor:
            return add(output_with_bias, change(residual), dropout)

        return run

    return _lent(layer, adding, add_to_changed)


def without_prediction_loss(model: Any) -> contextlib.AbstractContextManager[None]:
    """Within the block, a GPTModel's last steps compute no loss of multi-token prediction.

    Since release 0.16 it asks its config for `mtp_num_layers`. The layers have the config itself,
    the model a copy for so long.
    """
    config = copy.copy(model.config)
    config.mtp_num_layers = None
    return _lent(model, "config", config)


def routing_followed_by(
    router: Any, action: Callable[[Tensor], None]
) -> contextlib.AbstractContextManager[None]:
    """Within the block, an action gets the routing map wherever a router counts its tokens.

    Megatron counts where gradients are enabled, so that what is computed again counts once.

    Args:
        router: a Megatron `TopKRouter`, whose `routing` puts out probabilities and the map.
        action: gets the map [rows, experts] of booleans.
    """
    routing = router.routing

    def routing_then(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        probs, routing_map = routing(*args, **kwargs)
        if torch.is_grad_enabled():
            action(routing_map)
        return probs, routing_map

    return _lent(router, "routing", routing_then)


class _GivenRoutes:
    """Stands in for Megatron's `RouterReplay`: the experts are given, whatever the scores."""

    def __init__(self, experts: Tensor) -> None:
        self.experts = experts

    def get_replay_topk(self, scores: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The scores of the given experts, and these."""
        return scores.gather(1, self.experts), self.experts


def routed_as(router: Any, experts: Tensor) -> contextlib.AbstractContextManager[None]:
    """Within the block, a router sends its rows to given experts.

    Args:
        router: a Megatron `TopKRouter`, which asks its `router_replay`, where it has one, for the
            experts of each row.
        experts: [rows, topk] int64.

    Raises:
        ValueError: the release's router has no such attribute.
    """
    if not hasattr(router, "router_replay"):
        raise ValueError(
            "routes: the routers of this megatron-core cannot be given any; install 0.16 or newer"
        )
    return _lent(router, "router_replay", _GivenRoutes(experts))


def z_loss_by(
    router: Any, loss_of: Callable[[Tensor], Tensor]
) -> contextlib.AbstractContextManager[None]:
    """Within the block, a router's z-loss is another one.

    Like Megatron's it is there in training, where gradients are enabled, and backward begins from
    it too, wherever backward of the logits runs.

    Args:
        router: a Megatron `TopKRouter`, whose `apply_z_loss` gets the logits.
        loss_of: the logits [rows, experts] -> the loss.
    """

    def apply_z_loss(logits: Tensor, *_: Any, **__: Any) -> Tensor:
        if not (router.training and torch.is_grad_enabled()):
            return logits
        return MoEAuxLossAutoScaler.apply(logits, loss_of(logits))

    return _lent(router, "apply_z_loss", apply_z_loss)


def auxiliary_loss_by(
    router: Any, kind: AuxiliaryLoss, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> contextlib.AbstractContextManager[None]:
    """Within the block, one of a router's auxiliary losses is another one.

    Backward begins from it as from Megatron's, which asks for it in training only, where gradients
    are enabled.

    Args:
        router: a Megatron `TopKRouter`, whose `_apply_aux_loss` and the like get probabilities,
            scores and the routing map that follows from the scores.
        kind: of the loss.
        loss_of: scores and map, [rows, experts] each -> the loss.
    """

    def apply(probs: Tensor, scores: Tensor, routing_map: Tensor, *_: Any, **__: Any) -> Tensor:
        return MoEAuxLossAutoScaler.apply(probs, loss_of(scores, routing_map))

    return _lent(router, f"_apply_{kind}", apply)
