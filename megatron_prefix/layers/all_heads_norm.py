"""Norms of queries and keys over all heads of a token at once, as MiniMax-M2 has them.

Megatron's `q_layernorm` and `k_layernorm` norm each head by itself. These take their place in a
layer's spec. Each tensor-parallel rank has some of the heads; their sums of squares are added up
over the ranks. The weight of all heads is whole on each rank, which uses that of its own heads.
`finalize_model_grads` then adds up its gradient, as it does with that of any norm of such a name,
and checkpoints hold it as a norm of one rank.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class _AllHeadsNorm(torch.nn.Module):
    """RMSNorm over [heads, dim] of each token."""

    heads_option: ClassVar[str]

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any
    ) -> None:
        """See Megatron's norms.

        Args:
            hidden_size: of one head.
        """
        super().__init__()
        self.num_heads, self.eps = getattr(config, self.heads_option), eps
        if self.num_heads % config.tensor_model_parallel_size:
            raise ValueError(
                f"{self.heads_option}={self.num_heads} with tensor_model_parallel_size="
                f"{config.tensor_model_parallel_size}: a norm over all heads needs whole heads on "
                "each rank; use fewer ranks"
            )
        self.weight = torch.nn.Parameter(torch.ones(self.num_heads * hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """[T, 1, heads of this rank, dim] -> the same."""
        heads, dim = x.shape[-2:]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum((-2, -1), keepdim=True)
        weight = self.weight.view(self.num_heads, dim)
        if heads < self.num_heads:
            # The sum's gradient has a share of every rank.
            squares = reduce_from_tensor_model_parallel_region(squares)
            squares = copy_to_tensor_model_parallel_region(squares)
            first = parallel_state.get_tensor_model_parallel_rank() * heads
            weight = weight[first : first + heads]
        mean = squares / (self.num_heads * dim)
        return (wide * torch.rsqrt(mean + self.eps)).to(x.dtype) * weight


class AllHeadsQueryNorm(_AllHeadsNorm):
    """Of queries."""

    heads_option = "num_attention_heads"


class AllHeadsKeyNorm(_AllHeadsNorm):
    """Of keys."""

    heads_option = "num_query_groups"


def norm_over_all_heads(block: Any) -> None:
    """Let all layers of a block spec norm queries and keys over all heads."""
    for layer in block.layer_specs:
        submodules = layer.submodules.self_attention.submodules
        submodules.q_layernorm, submodules.k_layernorm = AllHeadsQueryNorm, AllHeadsKeyNorm
