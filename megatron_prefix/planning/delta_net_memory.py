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
    # A copy of the gate, where it is widened or rows are picked.
    gate = wide if element < wide else element * (rows < tokens)
    return (kept + rows * r.values * gate) // tensor + _gated(
        r, rows=rows, tensor=tensor, element=element, wide=wide
    )


def _gated(delta_net: DeltaNetShape, *, rows: int, tensor: int, element: int, wide: int) -> int:
    """Bytes of what is kept behind the norm: the activated gate, what it is multiplied by, and the
    product."""
    return rows * delta_net.values * (wide + 2 * element) // tensor


def delta_net_backward(
    delta_net: DeltaNetShape,
    *,
    chunk_tokens: int,
    widest_wave: int,
    tokens: int,
    rows: int,
    tensor: int,
    element: int,
    wide: int,
) -> int:
    """Bytes that backward needs at most, beside all that is kept of the layer; the norm of the
    heads has given back its own by then.

    Args:
        chunk_tokens, widest_wave: see `RecurrentRow`.
        tokens, rows, tensor, element, wide: see `delta_net_kept`.
    """
    r = delta_net
    k, v, c = r.key_channels, r.value_channels, r.chunk_tokens
    # The chunks, which are computed again, and their gradients, when those of a chunk's decays or
    # of its keys come together.
    of_head = max(12 * k + 4 * v + 9 * c, 15 * k + 4 * v + 7 * c)
    read = v * (element < wide)  # the gradient of what is read, widened
    states = 3 * widest_wave * r.state_size
    again = r.num_value_heads * (chunk_tokens * (of_head + read) + states) * wide // tensor
    # Gradients of the gate, and of what is read.
    around = tokens * 2 * r.values * element // tensor
    return again + around - _gated(r, rows=rows, tensor=tensor, element=element, wide=wide)
