"""How losses of routers are scaled in a framework, which divides gradients by Megatron's means."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prefix.integrations.packed_row import PackedRow
from megatron_prefix.layers.packed_seq_params import RouterLossScale
from megatron_prefix.megatron.releases import counts_tokens_of_all_ranks


def router_loss_scale(row: PackedRow, config: TransformerConfig) -> RouterLossScale:
    """As Megatron scales the losses of the framework's own row, without its padding.

    With `calculate_per_token_loss` gradients are divided by the tokens of the whole step, so
    Megatron multiplies these losses by the tokens of a microbatch.

    Args:
        row: of the framework.
        config: of the model, which is not context-parallel.
    """
    num_tokens, factor = int(row.lengths.sum()), 1.0
    if config.calculate_per_token_loss:
        ranks = config.tensor_model_parallel_size if config.sequence_parallel else 1
        factor = num_tokens / (1 if counts_tokens_of_all_ranks() else ranks)
    return RouterLossScale(num_tokens=max(num_tokens, 1), factor=factor)
