"""Memory of recurrent layers: parameters of one, what autograd keeps of it, and its backward.

h, T and N as in `memory.py`; all of it on a tensor-parallel rank, which has its part of the heads.
"""

from __future__ import annotations

from megatron_prefix.layout import RecurrentShape


def recurrent_parameters(recurrent: RecurrentShape, hidden_size: int, *, tensor: int) -> int:
    """Of the projections, the convolution, and the decays; not of the norm of the heads."""
    r = recurrent
    weights = hidden_size * (r.projected + r.values) + r.convolved * r.width
    return (weights + 2 * r.num_value_heads) // tensor


def recurrent_kept(
    recurrent: RecurrentShape,
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
    r = recurrent
    # What is projected, which the convolution and the gate read; what is convolved; its activation.
    kept = tokens * (r.projected + 2 * r.convolved) * element
    # Queries and keys of each value head, and the sizes that they were divided by.
    kept += tokens * 2 * (r.num_value_heads * r.key_channels + r.num_key_heads) * element
    # Of each head the decay, what it is made of, and how much is written.
    kept += tokens * r.num_value_heads * (3 * wide + element)
    gate = wide if element < wide else element * (rows < tokens)
    # The gate before and behind its activation, and what it is multiplied by, and the product.
    return (kept + rows * r.values * (gate + wide + 2 * element)) // tensor


def recurrent_root(recurrent: RecurrentShape, *, tensor: int, element: int, wide: int) -> int:
    """Bytes that a series keeps of its root: the last inputs of the convolution, the state, and the
    wide sums of the gradients of both.

    Args:
        tensor, element, wide: see `recurrent_kept`.
    """
    r = recurrent
    inputs = (r.width - 1) * r.convolved * (element + wide)
    state = r.num_states * r.state_size * 2 * wide
    return (inputs + state) // tensor


def recurrent_states(recurrent: RecurrentShape, count: int, *, tensor: int, wide: int) -> int:
    """Bytes of `count` states; tensor, wide: see `recurrent_kept`."""
    return count * recurrent.num_states * recurrent.state_size // tensor * wide


def recurrent_backward(recurrent: RecurrentShape, *, tokens: int, tensor: int, wide: int) -> int:
    """Bytes of the chunks, which are computed again in backward, and of their gradients.

    Args:
        tokens: of the chunks, which are filled up.
        tensor, wide: see `recurrent_kept`.
    """
    r = recurrent
    of_head = 12 * r.key_channels + 9 * r.value_channels + 9 * r.chunk_tokens
    states = 3 * r.key_channels * r.value_channels // r.chunk_tokens
    return tokens * r.num_value_heads * (of_head + states) * wide // tensor
