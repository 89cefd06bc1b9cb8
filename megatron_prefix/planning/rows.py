"""The rows of one microbatch: what each computes and sends, from the lengths of its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_prefix.layout.dispatch import shard_layout
from megatron_prefix.layout.labels import trained_labels
from megatron_prefix.layout.packing import PackedLayout, pack
from megatron_prefix.layout.pairs import attention_pairs
from megatron_prefix.layout.planner import GroupSlice, rows_of
from megatron_prefix.layout.prediction_cost import (
    NO_PREDICTIONS,
    PredictionFlops,
    prediction_flops,
    total_of,
)
from megatron_prefix.layout.rows import CommType
from megatron_prefix.layout.shard_stages import RankStages
from megatron_prefix.layout.sharding import ContextShards
from megatron_prefix.layout.step_packing import Packing
from megatron_prefix.layout.tree import PrefixTree
from megatron_prefix.layout.windows import RankRows, positions_asked_for
from megatron_prefix.planning.memory import MemoryModel
from megatron_prefix.planning.rank_sizes import RankSizes
from megatron_prefix.planning.recurrent_rows import RecurrentRows, recurrent_rows


@dataclass(frozen=True, kw_only=True)
class StepSetup:
    """How a step is run."""

    memory: MemoryModel
    ranks: RankSizes
    stages: Sequence[Sequence[Sequence[int]]]
    """[pipeline rank][chunk] the layers."""
    packing: Packing
    """For the data-parallel size and the multiples of `ranks`."""
    comm_type: CommType = "all_gather"


@dataclass(frozen=True, kw_only=True)
class WindowEstimate:
    """What layers with a sliding window do otherwise than the others, see `RowEstimate`."""

    pairs_per_rank: int
    copied: int
    """Rows of keys that are copied side by side, halos included; 0 where the window hides nothing
    or no layer has one."""
    travelling: int
    """Tokens whose keys and values a rank receives."""
    received_per_layer: int
    """Bytes that the busiest context-parallel rank receives, forward and backward."""


@dataclass(frozen=True, kw_only=True)
class RowEstimate:
    """One packed row. Per-rank numbers are those of the context-parallel rank with most."""

    tokens: int
    """Of the whole row, padding included."""
    tokens_per_rank: int
    labels_per_rank: int
    pairs_per_rank: int
    """In layers without a sliding window, as what travels and is received."""
    travelling: int
    """Tokens whose keys and values a rank receives."""
    windows: WindowEstimate
    recurrent: RecurrentRows
    flops: int
    """Of the whole row, forward, backward and recompute."""
    outer_flops: int
    """Of the output layer and multi-token prediction, less what a trimmed last layer saves."""
    received_per_layer: int
    """Bytes that the busiest context-parallel rank receives in a layer that attends, forward and
    backward."""


@dataclass(frozen=True, kw_only=True)
class MicrobatchEstimate:
    """One row, or a series of rows that run their root once."""

    rows: tuple[RowEstimate, ...]
    """Of a series, its root's row first."""

    @property
    def is_series(self) -> bool:
        """Whether keys and values of the first row are kept for the others."""
        return len(self.rows) > 1

    @property
    def tokens(self) -> int:
        """Of all rows, padding included."""
        return sum(row.tokens for row in self.rows)

    @property
    def flops(self) -> int:
        """Of all rows."""
        return sum(row.flops for row in self.rows)


def step_flops(
    memory: MemoryModel,
    *,
    tokens: int,
    pairs: int,
    labels: int,
    windowed_pairs: int = 0,
    trimmed_tokens: int = 0,
    trimmed_pairs: int = 0,
    predictions: PredictionFlops = NO_PREDICTIONS,
) -> int:
    """Forward, backward (twice the forward), and what is computed again for it.

    Args:
        memory: the model, and what it computes again.
        tokens, pairs, labels, windowed_pairs: as of `ModelShape.flops`.
        trimmed_tokens, trimmed_pairs: that the last layer has no queries for.
        predictions: what multi-token prediction adds.
    """
    shape, again = memory.shape, memory.recompute
    linear = tokens * shape.linear_flops_per_token()
    linear += predictions.linear - shape.last_layer_flops(tokens=trimmed_tokens, pairs=0)
    attention = shape.flops(tokens=0, pairs=pairs, labels=0, windowed_pairs=windowed_pairs)
    attention += predictions.attention
    attention -= shape.last_layer_flops(tokens=0, pairs=trimmed_pairs)
    head = predictions.head + labels * shape.head_flops_per_label()
    # The head's logits, and a recurrent layer's convolution and chunks, are made again in backward.
    total = 3 * (linear + attention) + 4 * head + tokens * shape.mixing_flops_per_token()
    return total + {"none": 0, "selective": attention, "full": linear + attention}[again]


def estimate_microbatch(
    units: Sequence[PrefixTree],
    slices: Sequence[GroupSlice],
    setup: StepSetup,
    *,
    first_trained: Sequence[Sequence[int]],
) -> MicrobatchEstimate:
    """Pack a microbatch and count what its rows cost.

    Args:
        units: what is planned as one.
        slices: of the microbatch.
        setup: how the step is run.
        first_trained: for each unit, for each sequence the index of its first trained token.
    """
    trained = [
        [first_trained[s.group][i] for s in row for i in s.sequences] for row in rows_of(slices)
    ]
    if not any(part.parts for part in slices):
        return MicrobatchEstimate(
            rows=(_row(setup.packing.microbatch(units, slices), trained[0], setup),)
        )
    unit = units[slices[0].group]
    root = unit.tokens[0]
    parts = [unit.subset(part) for part in slices[0].parts]
    return MicrobatchEstimate(
        rows=(
            _row(PrefixTree.from_sequences([root]), [len(root)], setup),
            *(
                _row(part, first, setup, root_elsewhere=True)
                for part, first in zip(parts, trained, strict=True)
            ),
        )
    )


def _row(
    tree: PrefixTree,
    first_trained: Sequence[int],
    setup: StepSetup,
    *,
    root_elsewhere: bool = False,
) -> RowEstimate:
    ranks, memory = setup.ranks, setup.memory
    layout = pack(
        tree, pad_to_multiple=setup.packing.pad_to_multiple, root_elsewhere=root_elsewhere
    )
    nodes = slice(1 if root_elsewhere else 0, None)
    num_root = int(tree.packed_lengths[0]) if root_elsewhere else 0
    labelled = np.zeros(layout.num_tokens, dtype=bool)
    for i, first in enumerate(first_trained):
        labelled[layout.sequence_positions(i)[first - 1 - num_root :]] = True
    pairs, labels = int(attention_pairs(tree)[nodes].sum()), int(labelled.sum())
    windowed_pairs = int(
        memory.shape.windowed_pairs(tree.packed_lengths, tree.first_positions)[nodes].sum()
    )
    untrained = (tree.packed_lengths - trained_labels(tree, first_trained))[nodes]
    trimmed = {
        "trimmed_tokens": int(untrained.sum()),
        "trimmed_pairs": int(
            memory.shape.last_layer_pairs(untrained, tree.first_positions[nodes]).sum()
        ),
    }
    if not memory.trim_last_layer:
        trimmed = {}
    labels_per_rank, pairs_per_rank, travelling, received = labels, pairs, 0, 0
    shards = None
    if ranks.context > 1:
        shards = shard_layout(layout, ranks.context)
        rows = [RankStages(shards, rank).rows() for rank in range(ranks.context)]
        labels_per_rank = max(int(labelled[r[r >= 0]].sum()) for r in rows)
        pairs_per_rank = int(shards.attention_pairs.max())
        travelling = int(shards.shard_tokens.sum() - shards.shard_tokens.min())
        received = _received_per_layer(setup, shards.tokens_per_rank, shards.shard_tokens.tolist())
        if setup.comm_type == "a2a":
            travelling = 0
    tokens = layout.num_tokens - layout.num_padding
    further = total_of(
        prediction_flops(memory.shape, tree, trained_labels(tree, first_trained))[nodes]
    )
    everything = {"pairs": pairs, "windowed_pairs": windowed_pairs}
    return RowEstimate(
        tokens=layout.num_tokens,
        tokens_per_rank=layout.num_tokens // ranks.context,
        labels_per_rank=labels_per_rank,
        pairs_per_rank=pairs_per_rank,
        travelling=travelling,
        windows=_windows(layout, shards, setup, windowed_pairs, travelling, received),
        recurrent=recurrent_rows(
            layout,
            shards,
            memory.shape,
            by_heads=setup.comm_type == "a2a",
            tensor=ranks.tensor,
            element=memory.element,
            wide=memory.wide,
        ),
        flops=step_flops(
            memory, tokens=tokens, labels=labels, predictions=further, **everything, **trimmed
        ),
        outer_flops=step_flops(
            memory, tokens=0, pairs=0, labels=labels, predictions=further, **trimmed
        ),
        received_per_layer=received,
    )


def _windows(
    layout: PackedLayout,
    shards: ContextShards | None,
    setup: StepSetup,
    pairs: int,
    travelling: int,
    received: int,
) -> WindowEstimate:
    """Of a row.

    Args:
        shards: None: the row is whole.
        pairs: of the whole row, in layers with a window.
        travelling, received: in the other layers.
    """
    memory = setup.memory
    shape, window = memory.shape, memory.shape.window
    ranks = [RankRows.of_row(layout)] if shards is None else RankRows.of_ranks(shards)
    if shards is not None:
        pairs = int(shards.pairs(shape.windowed_pairs).max())
    copied = 0
    if any(shape.windowed_layers) and layout.max_seqlen > window + 1:
        copied = max(_copied_keys(layout, held, window) for held in ranks)
        asked = positions_asked_for(layout, ranks, window)
        rows = np.array([[len(positions) for positions in of_rank] for of_rank in asked])
        travelling = int(rows.sum(axis=1).max())
        # Keys and values in forward and again in backward, then the gradients of what was sent.
        elements = 2 * rows.sum(axis=1) * memory.element + rows.sum(axis=0) * memory.wide
        received = int(elements.max()) * _key_width(setup)
    return WindowEstimate(
        pairs_per_rank=pairs, copied=copied, travelling=travelling, received_per_layer=received
    )


def _copied_keys(layout: PackedLayout, held: RankRows, window: int) -> int:
    """Keys of the rank's tokens and of the halos before each run of them."""
    first = held.rows[held.bounds[:-1]]
    real = (first >= 0) & (first < layout.num_tokens - layout.num_padding)
    halos = np.minimum(layout.position_ids[first[real]], window)
    return len(held.rows) + int(halos.sum())


def _key_width(setup: StepSetup) -> int:
    """Elements of a token's keys and values on a tensor-parallel rank."""
    shape = setup.memory.shape
    size = shape.kv_channels + shape.value_channels
    return shape.num_query_groups * size // setup.ranks.tensor


def _received_per_layer(setup: StepSetup, tokens_per_rank: int, shard_tokens: list[int]) -> int:
    """Bytes, forward and backward, that the rank that receives most receives in a layer."""
    memory, size = setup.memory, setup.ranks.context
    shape, b, wide = memory.shape, memory.element, memory.wide
    key_width = _key_width(setup)
    if setup.comm_type == "latent_gather":
        assert shape.latent is not None
        key_width = shape.latent.rank + shape.latent.shared_channels
    if setup.comm_type == "a2a":
        # Queries there, and the output back.
        head = shape.kv_channels + shape.value_channels
        width = shape.num_attention_heads * head // setup.ranks.tensor + key_width
        once = tokens_per_rank * width * (size - 1) // size * b
        return 2 * once
    # Keys and values in forward and again in backward, then the gradients of the rank's own from
    # every other rank.
    return max(
        2 * (sum(shard_tokens) - own) * key_width * b + (size - 1) * own * key_width * wide
        for own in shard_tokens
    )
