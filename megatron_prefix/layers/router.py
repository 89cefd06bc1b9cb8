"""What routers of experts learn from all tokens, a token counted once for each of its sequences.

Megatron counts how many tokens each expert gets, and moves the expert bias by these counts. Its
z-loss is a mean over the tokens of a microbatch. A shared token stands in the row once; of repeated
prompts it would be counted once for each sequence. So tokens are weighted by their multiplicity m,
which is 0 on padding; N is the sum of m over the microbatch:

    counts    of each expert  sum of m over the tokens that it gets
    z-loss    1/N * sum over tokens of m * logsumexp(logits)^2    (arXiv 2202.08906, equation 5)

Ranks that hold parts of a row have parts of these sums, whose gradients Megatron adds up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams, RouterLossScale
from megatron_prefix.megatron.borrowed import routing_followed_by, z_loss_by


def has_statistics(config: Any) -> bool:
    """Whether routers of a model learn from all tokens, not only from what follows them.

    Args:
        config: Megatron's `TransformerConfig`.
    """
    return _bias_moves(config) or has_losses(config)


def has_losses(config: Any) -> bool:
    """Whether routers of a model have losses of their own.

    Args:
        config: Megatron's `TransformerConfig`.
    """
    return bool(config.moe_z_loss_coeff)


def _bias_moves(config: Any) -> bool:
    return bool(config.moe_router_enable_expert_bias and config.moe_router_bias_update_rate)


def collects_statistics(layer: Any) -> bool:
    """Whether a transformer layer has experts whose router learns from all tokens."""
    return has_statistics(layer.config) and router_of(layer) is not None


def router_of(layer: Any) -> TopKRouter | None:
    """The router of a layer, also where an adapter (LoRA) wraps it."""
    return next((m for m in layer.mlp.modules() if isinstance(m, TopKRouter)), None)


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
    router, config, multiplicity = router_of(layer), layer.config, params.multiplicity
    assert router is not None
    if config.sequence_parallel:
        multiplicity = multiplicity.tensor_split(
            parallel_state.get_tensor_model_parallel_world_size()
        )[parallel_state.get_tensor_model_parallel_rank()]

    @torch.no_grad()
    def count_repeated(routing_map: Tensor) -> None:
        # Megatron has counted every row once. Whole numbers, which float32 holds up to 2^24.
        router.local_tokens_per_expert += (routing_map * (multiplicity - 1)[:, None]).sum(dim=0)

    def z_loss(logits: Tensor) -> Tensor:
        scale = _scale_of(params)
        squares = torch.logsumexp(logits, dim=-1).square()
        factor = config.moe_z_loss_coeff * scale.factor / scale.num_tokens
        return (squares * multiplicity).sum() * factor

    with contextlib.ExitStack() as lent:
        if _bias_moves(config):
            lent.enter_context(routing_followed_by(router, count_repeated))
        if config.moe_z_loss_coeff:
            lent.enter_context(z_loss_by(router, z_loss))
        yield


def _scale_of(params: PrefixPackedSeqParams) -> RouterLossScale:
    if params.router_losses is None:
        raise ValueError(
            "the model's routers have losses (moe_z_loss_coeff), and PrefixPackedSeqParams has no "
            "router_losses to scale them by. Give from_layout router_losses=RouterLossScale(...)"
        )
    return params.router_losses
