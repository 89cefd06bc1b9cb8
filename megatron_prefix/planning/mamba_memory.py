"""Memory of Mamba-2 layers: parameters of one, what autograd keeps of it, and its backward.

T and N as in `memory.py`; all of it on a tensor-parallel rank, which has its part of the heads.
"""

from __future__ import annotations

from megatron_prefix.layout import MambaShape


def mamba_parameters(mamba: MambaShape, hidden_size: int, *, tensor: int) -> int:
    """Of the projections, the convolution, the decays, steps and skips of heads, and the norm."""
    m = mamba
    weights = hidden_size * (m.projected + m.values) + m.convolved * (m.width + 1)
    return (weights + 3 * m.num_heads + m.values) // tensor


def mamba_kept(
    mamba: MambaShape,
    *,
    tokens: int,
    rows: int,
    tensor: int,
    element: int,
    wide: int,
) -> int:
    """Bytes that autograd keeps between the layer's input and its output projection.

    Args:
        tokens, rows: T and N.
        tensor: tensor-parallel ranks.
        element, wide: bytes of an element, and of one that is at least float32.
    """
    m = mamba
    # What is projected, which the convolution and the gate read; what is convolved; its activation.
    kept = tokens * (m.projected + 2 * m.convolved) * element
    # Of each head the step before and behind its activation, and the decay.
    kept += tokens * m.num_heads * 3 * wide
    # A copy of the gate, where it is widened or rows are picked.
    gate = wide if element < wide else element * (rows < tokens)
    return (kept + rows * m.values * gate) // tensor + _gated(
        m, rows=rows, tensor=tensor, element=element, wide=wide
    )


def _gated(mamba: MambaShape, *, rows: int, tensor: int, element: int, wide: int) -> int:
    """Bytes of what is kept behind the state: the activated gate, what it is multiplied by, the
    product, that with the root mean square of each group divided out, and the norm's output."""
    m = mamba
    return rows * (m.values * (4 * wide + element) + m.num_groups * wide) // tensor


def mamba_backward(
    mamba: MambaShape,
    *,
    chunk_tokens: int,
    widest_wave: int,
    tokens: int,
    rows: int,
    tensor: int,
    element: int,
    wide: int,
) -> int:
    """Bytes that backward needs at most, beside all that is kept of the layer.

    Args:
        chunk_tokens, widest_wave: see `RecurrentRow`.
        tokens, rows, tensor, element, wide: see `mamba_kept`.
    """
    m = mamba
    k, v, c = m.state_channels, m.head_channels, m.chunk_tokens
    # The chunks and their gradients, when those of a chunk's B, scores, inputs or decays come
    # together.
    chunks = max(
        m.num_heads * (8 * k + 4 * v + 4 * c) + 2 * m.groups,
        m.num_heads * (6 * k + 5 * v + 5 * c) + 2 * m.groups,
        m.num_heads * (4 * k + 6 * v + 5 * c) + 2 * m.groups,
        m.num_heads * (2 * k + 3 * v + 7 * c) + 4 * m.groups,
    )
    read = m.values * (element < wide)  # the gradient of what is read, widened
    states = 2 * widest_wave * m.num_heads * m.state_size
    again = (chunk_tokens * (chunks + read) + states) * wide // tensor
    # Gradients of the gate, of what is read, and of what goes round the state.
    around = tokens * 3 * m.values * element // tensor
    return again + around - _gated(m, rows=rows, tensor=tensor, element=element, wide=wide)
