"""Splits a call with a sliding window into batches of dense blocks under a mask.

torch's CPU op has no windows. A rectangle's queries are cut into blocks; a block's keys are its
queries' own, and as many of the `window` keys before the first of them as there are. So the pairs
that are computed grow with queries x (window + block), and not with the keys of a prefix.

    window = 3, blocks of 4       keys     0 1 2 3 4 5 6 7 8 ...
                                  block 1        . . . o o o o       own (o), before them (.)

Blocks of one shape, or of nearly equal lengths, are one batch whose mask they share; it is added to
the scores. Padding is at the end of a block: no real query sees a padded key, and a padded query
has a zero dout. Keys of several blocks are copies; their gradients are added up.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from megatron_prefix.attention.kernels.base import Rectangles
from megatron_prefix.attention.kernels.cpu_batches import Batch, EqualRows, PaddedRows

_SHORTEST, _LONGEST = 32, 256
"""Queries of a block: about as many as the window has keys, within these bounds."""
_HIDDEN = -1e30
"""Added to scores of hidden keys. Finite, since a row of the op's block of keys may have no other:
what it then adds up is multiplied by exp(-1e30 - m) = 0 as soon as there is a key that is seen."""


def split_into_blocks(on: Rectangles) -> tuple[Batch, ...]:
    """Batches that together hold every query of a call with a window once."""
    assert on.causal and on.window is not None
    return _split(tuple(on.cu_q.tolist()), tuple(on.cu_k.tolist()), on.window)


@functools.lru_cache(maxsize=64)  # every layer, forward and backward, asks for the same few
def _split(q_bounds: tuple[int, ...], k_bounds: tuple[int, ...], window: int) -> tuple[Batch, ...]:
    size = min(max(window + 1, _SHORTEST), _LONGEST)
    # (length up to the next power of two, keys before the block) -> where queries and keys begin
    blocks: dict[tuple[int, int], list[tuple[EqualRows, EqualRows]]] = {}
    ends = zip(itertools.pairwise(q_bounds), itertools.pairwise(k_bounds), strict=True)
    for (q_start, q_stop), (k_start, k_stop) in ends:
        own_keys = k_stop - (q_stop - q_start)  # that of the first query
        for offset in range(0, q_stop - q_start, size):
            length = min(size, q_stop - q_start - offset)
            own = own_keys + offset
            before = min(window, own - k_start)
            block = (
                EqualRows(start=q_start + offset, count=1, length=length),
                EqualRows(start=own - before, count=1, length=before + length),
            )
            blocks.setdefault(((length - 1).bit_length(), before), []).append(block)
    batches = []
    for (_, before), same in blocks.items():
        queries, keys = (PaddedRows.collect(list(runs)) for runs in zip(*same, strict=True))
        mask = _mask(queries.length, before, window)
        batches.append(Batch(queries=queries, keys=keys, mask=mask))
    return tuple(batches)


def _mask(num_queries: int, before: int, window: int) -> Tensor:
    """[1, 1, q, before + q]; query i's own key is before + i."""
    distance = torch.arange(num_queries)[:, None] + before - torch.arange(before + num_queries)
    hidden = (distance < 0) | (distance > window)
    return torch.zeros(hidden.shape).masked_fill(hidden, _HIDDEN)[None, None]
