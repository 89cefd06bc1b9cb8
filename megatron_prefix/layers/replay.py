"""Experts that tokens are sent to as they were when they were sampled: replayed routes.

A trainer's router may choose other experts than the server's did, by rounding alone. Where the
server has recorded its choice, the trainer's router can be given it; probabilities are still the
router's own, for the experts given (rollout routing replay, arXiv 2510.11370).
"""

from __future__ import annotations

import contextlib
from typing import Any

from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layers.router import own_rows, router_of
from megatron_prefix.megatron.borrowed import routed_as
from megatron_prefix.megatron.moe_layers import moe_layers


def replaying(layer: Any, params: PrefixPackedSeqParams) -> contextlib.AbstractContextManager[None]:
    """Within the block, the layer's router sends each row of the batch to the experts of its route.

    Args:
        layer: a Megatron transformer layer.
        params: of the batch, or those of its trimmed last layer.

    Raises:
        ValueError: routes of another number of layers or of experts than the model has, or a router
            that cannot be given any.
    """
    router = router_of(layer)
    if params.routes is None or router is None:
        return contextlib.nullcontext()
    config = layer.config
    with_experts = moe_layers(config)
    expected = (sum(with_experts), config.moe_router_topk)
    if tuple(params.routes.shape[1:]) != expected:
        raise ValueError(
            f"routes {tuple(params.routes.shape)}: the model has {expected[0]} layers with experts "
            f"and sends a token to {expected[1]}; expected [tokens, {expected[0]}, {expected[1]}]"
        )
    if config.moe_router_fusion:
        raise ValueError(
            "moe_router_fusion=True: the fused router chooses experts by itself, and cannot be "
            "given routes. Set moe_router_fusion to False"
        )
    routes = params.routes[:, sum(with_experts[: layer.layer_number - 1])]
    return routed_as(router, own_rows(routes, config).long())
