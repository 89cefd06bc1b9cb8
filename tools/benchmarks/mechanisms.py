"""Ways to compute attention over a group, each from its own row of q, k and v.

    grouped      this package: stages merged by log-sum-exp, on the packed row
    ungrouped    the same kernel on the row in which the prompt is repeated
    dense_mask   torch's scaled_dot_product_attention with a [T, T] mask on the packed row
    flex         compiled FlexAttention with a shared-prefix block mask on the packed row; it has no
                 backward on the CPU
    kv_copy      the prompt's attention, then each response against a copy of the prompt's keys and
                 values and its own

Shapes: q [T, H, D], k and v [T, Hk, D].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_prefix.attention.function import prefix_attention
from megatron_prefix.attention.kernels import select_kernel
from megatron_prefix.attention.row_attention import AttentionLayer
from megatron_prefix.device_copy import record_to_device
from megatron_prefix.layout import PackedLayout, pack, rank_row

from .names import MECHANISMS
from .shapes import Shape, trees

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """One side."""

    layout: PackedLayout
    rows: np.ndarray
    """[T] int64: the position in the grouped row that each position of this row stands for."""
    attend: Attend

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        """See `CoreAttention`: what a batch's params carry to every layer."""
        return self.attend(q, k, v, layer.scale)

    @property
    def first(self) -> np.ndarray:
        """[T] bool: the first time that a grouped position stands here."""
        _, first = np.unique(self.rows, return_index=True)
        return np.isin(np.arange(len(self.rows)), first)


def build_mechanism(
    name: str, shape: Shape, *, device: torch.device, kernel: str | None = None
) -> Mechanism:
    """The mechanism for a group of this shape.

    Raises:
        ValueError: there is none of this name.
    """
    both = trees(shape, 2, 0)
    layout = pack(both["grouped"].merge_chains())
    if name == "ungrouped":
        repeated = pack(both["ungrouped"])
        rows = np.concatenate([layout.sequence_positions(i) for i in range(shape.group_size)])
        return Mechanism(layout=repeated, rows=rows, attend=_stages(repeated, device, kernel))
    makers: dict[str, Callable[[], Attend]] = {
        "grouped": lambda: _stages(layout, device, kernel),
        "dense_mask": lambda: functools.partial(_sdpa, mask=_visible(layout, device)),
        "flex": lambda: _flex(layout, device),
        "kv_copy": lambda: functools.partial(_kv_copy, shape=shape),
    }
    if name not in makers:
        raise ValueError(f"unknown mechanism {name!r}: choose of {', '.join(MECHANISMS)}")
    return Mechanism(layout=layout, rows=np.arange(layout.num_tokens), attend=makers[name]())


def _stages(layout: PackedLayout, device: torch.device, kernel: str | None) -> Attend:
    stages = record_to_device(rank_row(layout).model.stages, device)

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        chosen = select_kernel(kernel, device=q.device, dtype=q.dtype, head_dim=q.shape[-1])
        return prefix_attention(q, k, v, stages, scale=scale, kernel=chosen)

    return attend


def _ancestors(layout: PackedLayout) -> tuple[np.ndarray, np.ndarray]:
    """[T] segment of each position, and [segments, segments] whether one is another's ancestor."""
    segments = layout.segments
    above = np.eye(len(segments), dtype=bool)
    for index, segment in enumerate(segments):
        if segment.parent >= 0:
            above[index] |= above[segment.parent]
    lengths = [segment.length for segment in segments]
    return np.repeat(np.arange(len(segments)), lengths), above


def _visible(layout: PackedLayout, device: torch.device) -> Tensor:
    """[T, T] bool."""
    segment, above = (torch.from_numpy(x).to(device) for x in _ancestors(layout))
    return above[segment[:, None], segment].tril_()


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, *, mask: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def _flex(layout: PackedLayout, device: torch.device) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    segment, above = (torch.from_numpy(x).to(device) for x in _ancestors(layout))

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return above[segment[query], segment[key]] & (key <= query)

    size = layout.num_tokens
    block_mask = create_block_mask(sees, None, None, size, size, device=str(device))
    compiled = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = compiled(
            *(x.transpose(0, 1)[None] for x in (q, k, v)),
            block_mask=block_mask,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out[0].transpose(0, 1)

    return attend


def _kv_copy(q: Tensor, k: Tensor, v: Tensor, scale: float, *, shape: Shape) -> Tensor:
    """Responses of unequal lengths are padded to the longest, as a batched call asks for."""
    prompt = shape.prefix - 1
    longest, count = max(shape.responses), shape.group_size
    if count == 1:  # one sequence: nothing is divided
        return _sdpa(q, k, v, scale, mask=None)

    def responses(x: Tensor) -> Tensor:
        parts = x[prompt:].split(shape.responses)
        return torch.stack([F.pad(p, (0, 0, 0, 0, 0, longest - len(p))) for p in parts])

    def with_prompt(x: Tensor) -> Tensor:
        return torch.cat((x[:prompt].expand(count, -1, -1, -1), responses(x)), dim=1)

    mask = torch.ones(longest, prompt + longest, dtype=torch.bool, device=q.device).tril_(prompt)
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (responses(q), with_prompt(k), with_prompt(v))),
        attn_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    ).transpose(1, 2)
    parts = [out[i, :n] for i, n in enumerate(shape.responses)]
    if prompt:
        parts.insert(0, _sdpa(*(x[:prompt] for x in (q, k, v)), scale, mask=None))
    return torch.cat(parts)
