"""Statistics of experts, in which a token counts once for each sequence that it belongs to.

Megatron counts how many tokens it sends to each expert, and moves the expert bias by these counts.
A shared token stands in the row once; of repeated prompts it would be counted once for each
sequence. So tokens are weighted by their multiplicity, which is 0 on padding.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.megatron.borrowed import routing_followed_by


def collects_statistics(layer: Any) -> bool:
    """Whether a transformer layer has experts whose bias follows the tokens that they get."""
    config = layer.config
    return (
        isinstance(getattr(layer.mlp, "router", None), TopKRouter)
        and config.moe_router_enable_expert_bias
        and config.moe_router_bias_update_rate != 0
    )


def counting_by_multiplicity(
    layer: Any, params: PrefixPackedSeqParams
) -> contextlib.AbstractContextManager[None]:
    """Within the block, the layer's router counts the rows of a batch by their multiplicity.

    Args:
        layer: that collects statistics.
        params: of the batch; the layer runs all of its rows.
    """
    assert params.multiplicity is not None and params.query_rows is None
    router, multiplicity = layer.mlp.router, params.multiplicity

    @torch.no_grad()
    def count_repeated(routing_map: Tensor) -> None:
        """routing_map [T, experts], or [T/tp, experts] under sequence parallelism."""
        own = multiplicity
        if layer.config.sequence_parallel:
            own = own.tensor_split(parallel_state.get_tensor_model_parallel_world_size())[
                parallel_state.get_tensor_model_parallel_rank()
            ]
        # Megatron has counted every row once. Whole numbers, which float32 holds up to 2^24.
        router.local_tokens_per_expert += (routing_map * (own - 1)[:, None]).sum(dim=0)

    return routing_followed_by(router, count_repeated)
