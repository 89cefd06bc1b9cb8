"""Experts with biases, on Megatron's local layers: what those need to train."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import RowParallelLinear


def let_experts_have_biases(model: torch.nn.Module) -> None:
    """Repair the second linear layer of experts with biases, which are never split.

    Megatron's MLP adds its bias in place. In a group of one process, the layer returns its product
    as the view of a reduction, which autograd does not let be changed. Told that somebody else
    communicates, the layer returns the product itself.

    Under sequence parallelism Megatron adds up gradients of the bias over tensor-parallel ranks,
    as is right where these have rows of one layer. Here they have experts of their own. For the
    same reason each counts in the norm of gradients, of which releases before 0.19 leave out those
    of all but the first tensor-parallel rank.
    """
    for module in model.modules():
        if isinstance(module, RowParallelLinear) and module.is_expert and module.bias is not None:
            assert module.tp_group.size() == 1, "Megatron splits no expert with biases"
            module.explicit_expert_comm = True
            module.bias.sequence_parallel = False
            module.bias.tensor_model_parallel = True
