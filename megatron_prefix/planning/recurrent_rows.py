"""What recurrent layers do otherwise than others in a row: filled chunks, and states on ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from megatron_prefix.layout import ModelShape, RecurrentShape
from megatron_prefix.layout.packing import PackedLayout
from megatron_prefix.layout.recurrence import chunked_tokens, widest_wave
from megatron_prefix.layout.sharding import ContextShards
from megatron_prefix.layout.shared_states import placed_states
from megatron_prefix.layout.stages import SharedStates
from megatron_prefix.layout.windows import RankRows, positions_asked_for


@dataclass(frozen=True, kw_only=True)
class RecurrentRow:
    """Of one row, in every recurrent layer of a kind. Numbers are those of the rank with most."""

    chunk_tokens: int = 0
    """Tokens of a rank's chunks, which are filled up."""
    widest_wave: int = 1
    """Chunks that a rank computes at once, at most."""
    begins: int = 0
    """States of other ranks that a rank's runs begin with, which it keeps for backward."""
    copied: int = 0
    """Numbers that a rank keeps again, side by side with those that came from other ranks."""
    received_per_layer: int = 0
    """Bytes that the busiest context-parallel rank receives, forward and backward."""


RecurrentRows: TypeAlias = Mapping[RecurrentShape, RecurrentRow]
"""The same of each kind of recurrent layer that the model has."""


def recurrent_rows(
    layout: PackedLayout,
    shards: ContextShards | None,
    shape: ModelShape,
    *,
    by_heads: bool,
    tensor: int,
    element: int,
    wide: int,
) -> RecurrentRows:
    """Count what a row costs in each kind of recurrent layer.

    Args:
        layout, shards: the row; shards None: it is whole.
        shape: of the model.
        by_heads: the layers exchange heads, where the row is distributed; otherwise states.
        tensor: tensor-parallel ranks.
        element, wide: bytes of an element, and of one that is at least float32.
    """
    return {
        kind: _recurrent_row(
            layout,
            shards,
            kind,
            width=shape.recurrence_width,
            by_heads=by_heads,
            tensor=tensor,
            element=element,
            wide=wide,
        )
        for kind in dict.fromkeys(shape.recurrent_layers)
        if kind is not None
    }


def _recurrent_row(
    layout: PackedLayout,
    shards: ContextShards | None,
    recurrent: RecurrentShape,
    *,
    width: int,
    by_heads: bool,
    tensor: int,
    element: int,
    wide: int,
) -> RecurrentRow:
    lengths = [segment.length for segment in layout.segments]
    whole = chunked_tokens(lengths)
    widest = widest_wave(lengths, [segment.parent for segment in layout.segments])
    if shards is None:
        return RecurrentRow(chunk_tokens=whole, widest_wave=widest)
    if by_heads:
        size = shards.num_ranks
        moved = recurrent.projected - recurrent.values
        # There, and the output back.
        once = moved * element + recurrent.values * (wide if recurrent.reads_wide else element)
        return RecurrentRow(
            chunk_tokens=whole // size,
            widest_wave=-(-widest // size),
            copied=shards.tokens_per_rank * moved // tensor,
            received_per_layer=2 * shards.tokens_per_rank * (size - 1) * once // size // tensor,
        )
    ranks = RankRows.of_ranks(shards)
    placed = placed_states(shards, ranks, 0)
    states = None if placed is None else placed.shared
    asked = positions_asked_for(layout, ranks, width - 1)
    halos = np.array([[len(positions) for positions in of_rank] for of_rank in asked])
    # Inputs of the convolution in forward, and the gradients of what was sent.
    received = (halos.sum(axis=1) + halos.sum(axis=0)) * recurrent.convolved // tensor * element
    if states is not None:
        received = received + _received_states(states, recurrent) // tensor * wide
    runs = [_run_lengths(held) for held in ranks]
    return RecurrentRow(
        chunk_tokens=max(chunked_tokens(lengths) for lengths in runs),
        # Most runs begin at once, with states of other ranks.
        widest_wave=max(map(len, runs)),
        begins=0 if states is None else max(states.begins_of_ranks),
        copied=int(halos.any())
        * (shards.tokens_per_rank + int(halos.sum(axis=1).max()))
        * (recurrent.convolved // tensor),
        received_per_layer=int(received.max()),
    )


def _run_lengths(held: RankRows) -> list[int]:
    real = held.rows[held.bounds[:-1]] >= 0
    return np.diff(held.bounds)[real].tolist()


def _received_states(states: SharedStates[np.ndarray], recurrent: RecurrentShape) -> np.ndarray:
    """[ranks] numbers: maps in forward; factors and gradients of states in backward."""
    factor, state = recurrent.factor_size, recurrent.state_size
    pieces, begins = (np.array(x) for x in (states.pieces_of_ranks, states.begins_of_ranks))
    of_head = (pieces.sum() - pieces) * (2 * factor + state) + (begins.sum() - begins) * state
    return recurrent.num_states * of_head
