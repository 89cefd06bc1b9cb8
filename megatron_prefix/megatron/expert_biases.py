"""Experts with biases, on Megatron's local layers."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import RowParallelLinear


def let_experts_add_biases(model: torch.nn.Module) -> None:
    """Make the experts of local layers trainable where they have biases.

    Megatron's MLP adds an expert's second bias in place. In a group of one process, its linear
    layer returns its product as the view of a reduction, which autograd does not let be changed.
    Told that somebody else communicates, the layer returns the product itself.
    """
    for module in model.modules():
        if (
            isinstance(module, RowParallelLinear)
            and module.is_expert
            and module.bias is not None
            and module.tp_group.size() == 1
        ):
            assert module.skip_bias_add, "an expert adds its bias by itself"
            module.explicit_expert_comm = True
