"""Memory of gated delta nets: parameters of one, what autograd keeps of it, and its backward.

T and N as in `memory.py`; all of it on a tensor-parallel rank, which has its part of the heads.
"""

from __future__ import annotations

from megatron_prefix.layout import DeltaNetShape


def delta_net_parameters(delta_net: DeltaNetShape, hidden_size: int, *, tensor: int) -> int:
    """Of the projections, the convolution, and the decays; not of the norm of the heads."""
    r = delta_net
    weights = hidden_size * (r.projected + r.values) + r.convolved * r.width
    return (weights + 2 * r.num_value_heads) // tensor


def delta_net_kept(
    delta_net: DeltaNetShape,
    *,
    tokens: int,
    rows: int,
    tensor: int,
    element: int,
    wide: int,
) -> int:
    """Bytes that autograd keeps between the layer's input and its output projection.

    Without what the norm of the heads keeps beside its output.

    Args:
        tokens, rows: T and N.
        tensor: tensor-parallel ranks.
        element, wide: bytes of an element, and of one that is at least float32.
    """
    r = delta_net
    # What is projected, which the convolution and the gate read; what is convolved; its activation.
    kept = tokens * (r.projected + 2 * r.convolved) * element
    # Queries and keys of each value head, and the sizes that they were divided by.
    kept += tokens * 2 * (r.num_value_heads * r.key_channels + r.num_key_heads) * element
    # Of each head the decay, what it is made of, and how much is written.
    kept += tokens * r.num_value_heads * (3 * wide + element)
    gate = wide if element < wide else element * (rows < tokens)
    # The gate before and behind its activation, and what it is multiplied by, and the product.
    return (kept + rows * r.values * (gate + wide + 2 * element)) // tensor


def delta_net_backward(delta_net: DeltaNetShape, *, tokens: int, tensor: int, wide: int) -> int:
    """Bytes of the chunks, which are computed again in backward, and of their gradients.

    Args:
        tokens: of the chunks, which are filled up.
        tensor, wide: see `delta_net_kept`.
    """
    r = delta_net
    of_head = 12 * r.key_channels + 9 * r.value_channels + 9 * r.chunk_tokens
    states = 3 * r.key_channels * r.value_channels // r.chunk_tokens
    return tokens * r.num_value_heads * (of_head + states) * wide // tensor
