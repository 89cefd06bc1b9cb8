"""A packed row as a layer reads it whose state runs along each sequence.

Such a layer has a short causal convolution, which reads a token's last inputs along its path, and a
state, which is handed from the end of a segment to all of its children.

The state is computed in chunks. A segment is cut into chunks of at most `size` tokens; the chunk
before one is its segment's or, at the segment's beginning, the last one of the segment above.
Chunks are in waves: those of a wave have as many chunks before them on their paths, so that all of
them can be computed at once from the states behind the wave before.

    prompt  | 0 | 1 | 2 |            response a  | 3 | 4 |        (numbers of waves)
                                     response b  | 3 |
"""

from __future__ import annotations

import itertools

import numpy as np

from megatron_prefix.layout.layer_shapes import CHUNK_TOKENS
from megatron_prefix.layout.packing import PackedLayout
from megatron_prefix.layout.stages import Recurrence, Wave
from megatron_prefix.layout.windows import rows_before


def recurrence(layout: PackedLayout, *, width: int) -> Recurrence[np.ndarray]:
    """Plan a row for recurrent layers.

    Args:
        layout: the whole row, with its roots.
        width: inputs that the convolution reads, the token's own included.

    Raises:
        ValueError: the row's root ran in an earlier row.
    """
    if layout.root_stage is not None:
        raise ValueError(
            "share_across_microbatches: true cannot be combined with recurrent layers yet (a row "
            "of responses would need the state behind its prompt from an earlier row); set "
            "share_across_microbatches: false"
        )
    chunks, before, wave_of = _chunks(layout)
    order = np.argsort(wave_of, kind="stable")
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    bounds = np.searchsorted(wave_of[order], np.arange(wave_of.max(initial=-1) + 2))
    waves = []
    for wave, (start, stop) in enumerate(itertools.pairwise(bounds)):
        parents = before[order[start:stop]]
        first = bounds[wave - 1] if wave else 0
        waves.append(
            Wave(
                chunks=slice(int(start), int(stop)),
                before=number[parents] - first if wave else np.zeros(0, dtype=np.int64),
            )
        )
    chunks = chunks[order]
    places = np.zeros(layout.num_tokens + 1, dtype=np.int64)
    places[chunks.reshape(-1)] = np.arange(chunks.size)
    real = np.arange(layout.num_tokens) < layout.num_tokens - layout.num_padding
    return Recurrence(
        inputs=_inputs(layout, width),
        chunks=chunks,
        waves=tuple(waves),
        place=np.where(real, places[:-1], 0),
        real=real,
    )


def _chunks(layout: PackedLayout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[C, size] tokens, [C] the chunk before each (-1: none), and [C] its wave."""
    longest = max((s.length for s in layout.segments), default=1)
    size = min(CHUNK_TOKENS, longest)
    rows, before, wave_of = [], [], []
    last_of_segment: list[int] = []
    for segment in layout.segments:
        parent = last_of_segment[segment.parent] if segment.parent >= 0 else -1
        for start in range(segment.start, segment.start + segment.length, size):
            tokens = np.full(size, layout.num_tokens, dtype=np.int64)
            stop = min(start + size, segment.start + segment.length)
            tokens[: stop - start] = np.arange(start, stop)
            rows.append(tokens)
            before.append(parent)
            wave_of.append(wave_of[parent] + 1 if parent >= 0 else 0)
            parent = len(rows) - 1
        last_of_segment.append(parent)
    return (
        np.array(rows, dtype=np.int64).reshape(-1, size),
        np.array(before, dtype=np.int64),
        np.array(wave_of, dtype=np.int64),
    )


def _inputs(layout: PackedLayout, width: int) -> np.ndarray:
    """[T, width] see `Recurrence.inputs`."""
    tokens = np.arange(layout.num_tokens)
    inputs = tokens[:, None] + np.arange(1 - width, 1)
    for segment in layout.segments:
        above = rows_before(layout, segment.start, width - 1)
        above = np.append(np.full(width - 1 - len(above), layout.num_tokens), above)
        path = np.append(above, np.arange(segment.start, segment.start + segment.length))
        own = slice(segment.start, segment.start + segment.length)
        inputs[own] = np.lib.stride_tricks.sliding_window_view(path, width)
    inputs[layout.num_tokens - layout.num_padding :] = layout.num_tokens
    return inputs
