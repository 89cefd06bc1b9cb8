"""What attention with shared prefixes has to give: from a dense mask, and from whole sequences.

Neither uses the layout's stages. Both are differentiated by autograd, in the inputs' dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.attention.kernels import Rectangles
from megatron_prefix.device_copy import record_to_device
from megatron_prefix.layout import RowStages, rank_row
from megatron_prefix.layout.packing import PackedLayout
from megatron_prefix.layout.tree import PrefixTree


def random_tree(
    rng: np.random.Generator, *, num_nodes: int = 24, max_depth: int = 6, max_length: int = 40
) -> PrefixTree:
    """A forest that reaches `max_depth` and has nodes of one token; T is a few hundred."""
    parents, depths = [-1], [1]
    for node in range(1, num_nodes):
        # The first nodes are one path, so that every depth is reached.
        shallow = [n for n in range(node) if depths[n] < max_depth]
        parent = node - 1 if node < max_depth else int(rng.choice([-1, *shallow]))
        parents.append(parent)
        depths.append(1 if parent < 0 else depths[parent] + 1)
    lengths = np.where(rng.random(num_nodes) < 0.25, 1, rng.integers(2, max_length, num_nodes))
    lengths = np.where(np.array(parents) < 0, np.maximum(lengths, 2), lengths)
    paths: list[tuple[int, ...]] = []
    for node, parent in enumerate(parents):
        paths.append((node,) if parent < 0 else (*paths[parent], node))
    # A sequence ends at every leaf, and at some inner nodes.
    ends = [n for n in range(num_nodes) if n not in parents or rng.random() < 0.1]
    return PrefixTree(
        parents=tuple(parents),
        tokens=tuple(rng.integers(0, 1000, int(length)) for length in lengths),
        sequences=tuple(paths[n] for n in ends),
    )


def group(prefix: int, responses: list[int]) -> tuple[list[int], list[list[int]]]:
    """Tokens of a group with these lengths; attention does not look at them."""
    return [0] * prefix, [[0] * n for n in responses]


def visible_keys(layout: PackedLayout) -> Tensor:
    """[T, T] bool: whether row i sees row j, written down sequence by sequence."""
    visible = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    for i in range(layout.tree.num_sequences):
        rows = torch.from_numpy(layout.sequence_positions(i))
        visible[rows[:, None], rows] |= torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
    padding = slice(layout.num_tokens - layout.num_padding, None)
    visible[padding, padding] = True
    return visible & torch.ones_like(visible).tril()


def dense_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """[T, H, D] with the full mask, all scores at once."""
    group_size = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group_size, dim=1) for x in (k, v))
    scores = scale * torch.einsum("qhd,khd->hqk", q, k)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def attention_by_sequence(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float
) -> list[Tensor]:
    """Plain causal attention [length - 1, H, D] of each sequence alone, its prefix repeated."""
    outputs = []
    for i in range(layout.tree.num_sequences):
        rows = torch.from_numpy(layout.sequence_positions(i))
        q_i, k_i, v_i = (x[rows].transpose(0, 1) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q_i, k_i, v_i, is_causal=True, scale=scale, enable_gqa=True
        )
        outputs.append(out.transpose(0, 1))
    return outputs


def random_qkv(
    num_tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as Megatron hands them over: views of a fused projection [T, kv_heads, ...]."""
    group_size = heads // kv_heads
    mixed = torch.randn(num_tokens, kv_heads, (group_size + 2) * head_dim, dtype=torch.float64)
    q, k, v = mixed.to(dtype).split([group_size * head_dim, head_dim, head_dim], dim=-1)
    return q.unflatten(2, (group_size, head_dim)).flatten(1, 2), k, v


def rectangles(q_lengths: list[int], k_lengths: list[int], *, causal: bool) -> Rectangles:
    """A kernel call's rectangles of these lengths."""
    return Rectangles(
        cu_q=torch.tensor([0, *q_lengths]).cumsum(0).to(torch.int32),
        cu_k=torch.tensor([0, *k_lengths]).cumsum(0).to(torch.int32),
        max_q=max(q_lengths),
        max_k=max(k_lengths),
        causal=causal,
    )


def in_window(layout: PackedLayout, window: int) -> Tensor:
    """[T, T] bool: `visible_keys` at most so many positions before the query."""
    positions = torch.from_numpy(layout.position_ids)
    return visible_keys(layout) & (positions[:, None] - positions <= window)


def stages_of(
    layout: PackedLayout, device: torch.device | str = "cpu", **options: Any
) -> RowStages[Tensor]:
    """The stages of a packed row on one rank; with `needed`, those of the trimmed last layer."""
    row = record_to_device(rank_row(layout, **options).model, device)
    return row.last_stages or row.stages


def gradients(out: Tensor, dout: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """dq, dk, dv."""
    return torch.autograd.grad(out, inputs, dout)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """No element is off by more than `tolerance` times the largest expected one. NaN is off."""
    assert actual.shape == expected.shape, what
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= tolerance, f"{what}: off by {error:.2e} of its largest element"
