"""Experts of a layer that a Hugging Face folder keeps in one tensor, as gpt-oss' do.

There a matrix is [inputs, outputs], and the two halves of the first one alternate, output by
output. Megatron's are [outputs, inputs], the first half above the second.
"""

from __future__ import annotations

from torch import Tensor


def to_megatron(tensor: Tensor, *, gated: bool) -> Tensor:
    """[experts, inputs, outputs] -> [experts, outputs, inputs]; biases are [experts, outputs].

    Args:
        gated: the outputs are two halves that alternate.
    """
    tensor = _turned(tensor)
    if gated:
        tensor = tensor.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return tensor.contiguous()


def to_hf(tensor: Tensor, *, gated: bool) -> Tensor:
    """The way back; see `to_megatron`."""
    if gated:
        tensor = tensor.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return _turned(tensor).contiguous()


def _turned(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2) if tensor.dim() == 3 else tensor
