"""One rank's part of a packed row, planned on the host: placed, staged, and trimmed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection

import numpy as np

from megatron_prefix.layout.dispatch import shard_layout
from megatron_prefix.layout.packing import PackedLayout
from megatron_prefix.layout.recurrence import rank_recurrence, recurrence
from megatron_prefix.layout.rows import COMM_TYPES, CommType, RankRow, RowStages
from megatron_prefix.layout.shard_stages import stages_of_rank
from megatron_prefix.layout.trimming import trim_row
from megatron_prefix.layout.windows import RankRows, windowed_stages


def rank_row(
    layout: PackedLayout,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    comm_types: Collection[CommType] = COMM_TYPES,
    needed: np.ndarray | None = None,
    multiple: int = 1,
    window: int | None = None,
    recurrence_width: int | None = None,
) -> RankRow:
    """Plan one rank's part of a packed row.

    Args:
        layout: the row, the same on every context-parallel rank; its length a multiple of
            `num_ranks`.
        rank, num_ranks: of the context-parallel ranks.
        comm_types: how the model's layers communicate.
        needed: [n] int64 positions of the packed row whose output is needed; the last layer leaves
            out what it can of all others. (From a segment's first needed position all to its end
            are computed, and more to fill up.) None: all are.
        multiple: the number of output rows is a multiple of this: the tensor-parallel size, under
            sequence parallelism.
        window: of the model's layers with a sliding window, see `Rectangles`; None: it has none.
        recurrence_width: inputs that the convolution of the model's recurrent layers reads; None:
            it has no such layers.

    Raises:
        ValueError: the row's length does not divide by the number of ranks.
    """
    if num_ranks == 1:
        shards, rows = None, np.arange(layout.num_tokens)
        stages = RowStages(
            num_tokens=len(rows),
            queries=None,
            cu_seqlens_q=np.array([0, len(rows)], dtype=np.int32),
            local=layout.stages,
            root=layout.root_stage,
        )
    else:
        assert layout.root_stage is None, "not with context parallelism"
        shards = shard_layout(layout, num_ranks)
        rows, stages = stages_of_rank(shards, rank, comm_types)
    paths = None
    if recurrence_width is not None:
        whole_row = stages.whole_row
        if whole_row is not None:
            paths_of_row = recurrence(layout, width=recurrence_width)
            whole_row = dataclasses.replace(whole_row, recurrence=paths_of_row)
            stages = dataclasses.replace(stages, whole_row=whole_row)
        if shards is None:
            paths = recurrence(layout, width=recurrence_width)
        elif set(comm_types) != {"a2a"}:
            paths = rank_recurrence(shards, rank, width=recurrence_width)
    last_stages = None
    if needed is not None:
        in_row = np.zeros(layout.num_tokens, dtype=bool)
        in_row[needed] = True
        last_stages = trim_row(stages, in_row[rows] & (rows >= 0), multiple=multiple)
    if window is not None:
        ranks = [RankRows.of_row(layout)] if shards is None else RankRows.of_ranks(shards)
        layers = [stages] if last_stages is None else [stages, last_stages]
        found = windowed_stages(layout, ranks, rank, window, layers=layers)
        stages, last_stages = (
            of_layer and dataclasses.replace(of_layer, windowed=windowed)
            for of_layer, windowed in itertools.zip_longest((stages, last_stages), found)
        )
    return RankRow.of(layout, rows, stages, last_stages, shards, paths)
