"""What one rank holds of a packed row, on the host and on the device.

Without context parallelism that is the whole row. With it the stages depend on how a layer's ranks
communicate (Megatron's option `cp_comm_type`); those of the model's kinds are there, no others:

    all_gather   `local`, then `gathered` against the shards of all ranks at once
    p2p          `local`, then `ring[r]` against the shard of each rank r
    a2a          `whole_row`, every rank for its share of the heads

Recurrent layers read `recurrence`: the rank's part of the row, or with a2a the whole row's.

Legend: T tokens of the packed row; C tokens of this rank's part of it; N of them attend (all, but
for a trimmed last layer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, get_args

import numpy as np

from megatron_prefix.layout.packing import PackedLayout
from megatron_prefix.layout.sharding import ContextShards
from megatron_prefix.layout.stages import (
    Array,
    AttentionStage,
    GatheredStages,
    Recurrence,
    WindowedStages,
)

CommType = Literal["all_gather", "p2p", "a2a", "latent_gather"]

COMM_TYPES: tuple[CommType, ...] = get_args(CommType)


@dataclass(frozen=True, kw_only=True, eq=False)
class WholeRow(Generic[Array]):
    """The whole packed row, which `a2a` attends to for some of the heads."""

    stages: tuple[AttentionStage[Array], ...]
    from_ranks: Array
    """[T] int64: which of all ranks' tokens, one rank behind the other, each of the row's is."""
    to_ranks: Array
    """[T] int64: which of the row's tokens each of all ranks' is."""
    recurrence: Recurrence[Array] | None = None
    """For recurrent layers; None: the model has none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowStages(Generic[Array]):
    """The attention of a rank's row in a layer: every layer's, or the trimmed last one's."""

    num_tokens: int
    """C, padding included: keys and values."""
    queries: Array | None
    """[N] int64 ascending: the tokens that attend; None: all."""
    cu_seqlens_q: Array
    """[2] int32: 0 and N. To Megatron the tokens that attend are one packed sequence."""
    local: tuple[AttentionStage[Array], ...]
    """What needs no other rank. First the self stage: causal squares of all N queries, in order."""
    gathered: GatheredStages[Array] | None = None
    ring: tuple[tuple[AttentionStage[Array], ...], ...] | None = None
    """By the rank whose shard the stages attend to, keys counted from the shard's beginning."""
    whole_row: WholeRow[Array] | None = None
    windowed: WindowedStages[Array] | None = None
    """In place of all of these in layers with a sliding window; None: there are no such layers, or
    the window hides nothing."""
    root: AttentionStage[Array] | None = None
    """Against the keys of a root that an earlier row has run; None: the row has its roots."""

    @property
    def num_queries(self) -> int:
        """N"""
        return self.num_tokens if self.queries is None else len(self.queries)


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelRow(Generic[Array]):
    """What the model reads of a rank's row: all that goes to the device."""

    input_ids: Array
    """[C] int64; 0 on padding."""
    position_ids: Array
    """[C] int64, counted along each sequence; 0 on padding."""
    multiplicity: Array
    """[C] int64: sequences that run through each position; 0 on padding."""
    stages: RowStages[Array]
    last_stages: RowStages[Array] | None
    """Of the model's last layer, where it computes the output of some rows only."""
    recurrence: Recurrence[Array] | None = None
    """Of the rank's tokens, for recurrent layers that do not exchange heads; None: the model has
    none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RankRow:
    """One rank's part of a packed row, on the host."""

    rows: np.ndarray
    """[C] int64: position in the packed row of each token; -1 on padding that context parallelism
    has moved."""
    labels: np.ndarray
    """[C] int64; 0 on padding."""
    model: ModelRow[np.ndarray]
    max_seqlen: int
    """Positions of the longest sequence."""
    shards: ContextShards | None
    """How the row is distributed; None: all of it is here."""

    @classmethod
    def of(
        cls,
        layout: PackedLayout,
        rows: np.ndarray,
        stages: RowStages[np.ndarray],
        last_stages: RowStages[np.ndarray] | None,
        shards: ContextShards | None,
        recurrence: Recurrence[np.ndarray] | None = None,
    ) -> RankRow:
        """These rows of a packed row; see the fields."""
        return cls(
            rows=rows,
            labels=own_values(layout.labels, rows),
            model=ModelRow(
                input_ids=own_values(layout.input_ids, rows),
                position_ids=own_values(layout.position_ids, rows),
                multiplicity=own_values(layout.multiplicity, rows),
                stages=stages,
                last_stages=last_stages,
                recurrence=recurrence,
            ),
            max_seqlen=layout.max_seqlen,
            shards=shards,
        )

    @property
    def output_rows(self) -> np.ndarray:
        """[N] int64 ascending: the rank's tokens whose output the model computes."""
        last = self.model.last_stages
        return np.arange(len(self.rows)) if last is None else last.queries


def own_values(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[C, ...] a rank's part of the values [T, ...] of a packed row; 0 on padding.

    Args:
        values: such as `layout.input_ids`.
        rows: of the rank, see `RankRow`.
    """
    own = values[rows]
    own[rows < 0] = 0
    return own
