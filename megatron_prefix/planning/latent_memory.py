"""Memory of multi-latent attention: parameters of a layer, and what autograd keeps of it.

h, T and N as in `memory.py`; n heads of a tensor-parallel rank, with keys of size D.
"""

from __future__ import annotations

from megatron_prefix.layout import LatentShape, ModelShape


def latent_expansion(shape: ModelShape, latent: LatentShape) -> int:
    """Numbers of a token that its latents are expanded into, for all heads."""
    size = shape.kv_channels - latent.shared_channels + latent.value_channels
    return shape.num_attention_heads * size


def latent_parameters(
    shape: ModelShape, latent: LatentShape, *, tensor: int, whole_down: bool
) -> int:
    """Of a layer's projections, on a rank.

    Args:
        tensor: tensor-parallel ranks.
        whole_down: whether every rank has the down projections whole, as with Transformer Engine.
    """
    h, heads = shape.hidden_size, shape.num_attention_heads // tensor
    down = (latent.rank + latent.shared_channels + latent.query_rank) * h
    queries = (latent.query_rank or h) * heads * shape.kv_channels
    others = (
        latent.rank * latent_expansion(shape, latent) // tensor + heads * latent.value_channels * h
    )
    return (down if whole_down else down // tensor) + queries + others


def latent_kept(
    shape: ModelShape,
    latent: LatentShape,
    *,
    tokens: int,
    rows: int,
    tensor: int,
    sequence: int,
    element: int,
) -> int:
    """Bytes that autograd keeps between the layer's input and its output projection.

    Args:
        tokens, rows: T and N.
        tensor, sequence: tensor-parallel ranks; the same under sequence parallelism, else 1.
        element: bytes of an element.
    """
    heads = shape.num_attention_heads // tensor
    keys, values = heads * shape.kv_channels, heads * latent.value_channels
    # Inputs of the projections: what they are compressed to.
    kept = tokens // sequence * (latent.query_rank + latent.rank + latent.shared_channels)
    # Cosine and sine: one copy for queries and keys where neither rows nor dtype make it another.
    angles = tokens if rows == tokens and element >= 4 else tokens + rows
    kept += angles * 2 * latent.shared_channels
    kept += rows * keys + tokens * keys  # queries and keys
    return (kept + tokens * values + rows * values) * element  # values and the output
