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
from torch import Tensor


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
def residual_through(layer: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, a layer adds its attention's output to `change(residual)`.

    Args:
        layer: a Megatron transformer layer, whose `self_attn_bda` makes the function that adds.
        change: the residual as the layer has it -> as the attention's output needs it.
    """
    bias_dropout_add = layer.self_attn_bda

    def add_to_changed(training: bool, fused: bool) -> Callable[..., Tensor]:
        add = bias_dropout_add(training, fused)

        def run(output_with_bias: Any, residual: Tensor, dropout: float) -> Tensor:
            return add(output_with_bias, change(residual), dropout)

        return run

    # Megatron's is a plain function as a rule, but may be a module, which an instance attribute
    # comes before.
    before = layer.__dict__.get("self_attn_bda")
    layer.__dict__["self_attn_bda"] = add_to_changed
    try:
        yield
    finally:
        if before is None:
            del layer.__dict__["self_attn_bda"]
        else:
            layer.__dict__["self_attn_bda"] = before


@contextlib.contextmanager
def routing_followed_by(router: Any, action: Callable[[Tensor], None]) -> Iterator[None]:
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

    # An instance attribute comes before the class's method.
    router.__dict__["routing"] = routing_then
    try:
        yield
    finally:
        del router.__dict__["routing"]
