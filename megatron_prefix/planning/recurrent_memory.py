"""Memory of recurrent layers: parameters of one, what autograd keeps of it, and its backward.

h, T and N as in `memory.py`; all of it on a tensor-parallel rank, which has its part of the heads.
"""

from __future__ import annotations

from megatron_prefix.layout import DeltaNetShape, MambaShape, RecurrentShape
from megatron_prefix.planning.delta_net_memory import (
    delta_net_backward,
    delta_net_kept,
    delta_net_parameters,
)
from megatron_prefix.planning.mamba_memory import mamba_backward, mamba_kept, mamba_parameters


def recurrent_parameters(recurrent: RecurrentShape, hidden_size: int, *, tensor: int) -> int:
    """Of a layer, on a rank; without the norm of a gated delta net's heads."""
    if isinstance(recurrent, MambaShape):
        return mamba_parameters(recurrent, hidden_size, tensor=tensor)
    assert isinstance(recurrent, DeltaNetShape)
    return delta_net_parameters(recurrent, hidden_size, tensor=tensor)


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

    Without what the norm of a gated delta net's heads keeps beside its output.

    Args:
        tokens, rows: T and N.
        tensor: tensor-parallel ranks.
        element, wide: bytes of an element, and of one that is at least float32.
    """
    sizes = {"tokens": tokens, "rows": rows, "tensor": tensor, "element": element, "wide": wide}
    if isinstance(recurrent, MambaShape):
        return mamba_kept(recurrent, **sizes)
    assert isinstance(recurrent, DeltaNetShape)
    return delta_net_kept(recurrent, **sizes)


def recurrent_root(
    recurrent: RecurrentShape, *, width: int, tensor: int, element: int, wide: int
) -> int:
    """Bytes that a series keeps of its root: the last inputs of the convolution, the state, and the
    wide sums of the gradients of both.

    Args:
        width: see `ModelShape.recurrence_width`.
        tensor, element, wide: see `recurrent_kept`.
    """
    r = recurrent
    inputs = (width - 1) * r.convolved * (element + wide)
    state = r.num_states * r.state_size * 2 * wide
    return (inputs + state) // tensor


def recurrent_states(recurrent: RecurrentShape, count: int, *, tensor: int, wide: int) -> int:
    """Bytes of `count` states; tensor, wide: see `recurrent_kept`."""
    return count * recurrent.num_states * recurrent.state_size // tensor * wide


def recurrent_backward(
    recurrent: RecurrentShape,
    *,
    chunk_tokens: int,
    widest_wave: int,
    tokens: int,
    rows: int,
    tensor: int,
    element: int,
    wide: int,
) -> int:
    """Bytes of the chunks, which are computed again in backward, and of their gradients; less what
    is kept and gone by then, but for the norm of a gated delta net's heads.

    Args:
        chunk_tokens, widest_wave: see `RecurrentRow`.
        tokens, rows, tensor, element, wide: see `recurrent_kept`.
    """
    sizes = {
        "chunk_tokens": chunk_tokens,
        "widest_wave": widest_wave,
        "tokens": tokens,
        "rows": rows,
        "tensor": tensor,
        "element": element,
        "wide": wide,
    }
    if isinstance(recurrent, MambaShape):
        return mamba_backward(recurrent, **sizes)
    assert isinstance(recurrent, DeltaNetShape)
    return delta_net_backward(recurrent, **sizes)
