"""A microbatch from its packed row and its sequences: entries, this rank's row, both together.

plan_batch    layout, sequences -> HostBatch: everything as NumPy, without the device
build_batch   the same on the device
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.layers.packed_seq_params import RouterLossScale
from megatron_prefix.layout import CommType, PackedLayout, rank_row
from megatron_prefix.layout.routes import scatter_routes
from megatron_prefix.training.batch import HostBatch, PackedBatch, host_batch, to_device
from megatron_prefix.training.entries import TrainedSequence, row_entries
from megatron_prefix.training.predicted import PredictionPlan, plan_predictions


def plan_batch(
    layout: PackedLayout,
    sequences: Sequence[TrainedSequence],
    *,
    rank: int = 0,
    num_ranks: int = 1,
    comm_types: Collection[CommType] = ("all_gather",),
    window: int | None = None,
    recurrence_width: int | None = None,
    trim_last_layer: bool = False,
    output_multiple: int = 1,
    router_losses: RouterLossScale | None = None,
    prediction: PredictionPlan | None = None,
    routes: Sequence[np.ndarray] | None = None,
    position_shifts: Sequence[np.ndarray] | None = None,
) -> HostBatch:
    """Plan this rank's part of a packed row, and what is trained on in it.

    Neither the device nor other ranks are asked, so a thread can plan one microbatch while another
    one runs.

    Args:
        layout: the packed row.
        sequences: one for each sequence of `layout.tree`, in its order.
        rank, num_ranks: of the context-parallel ranks that the row is distributed over.
        comm_types: how the model's layers communicate.
        window: of the model's layers with a sliding window; None: it has none.
        recurrence_width: of the model's recurrent layers; None: it has none.
        trim_last_layer: the model's output has only the rows that are trained on (and some that
            come with them), and its last layer computes no others; see `rank_row`.
        output_multiple: such an output's length is a multiple of this.
        router_losses: see `PrefixPackedSeqParams`.
        prediction: of a model with multi-token prediction; not with a trimmed last layer.
        routes: of each sequence [length - 1, layers, topk], that have been checked; None: the
            routers choose.
        position_shifts: of each sequence [length - 1, 3], for a model with mRoPE: by how much its
            inputs' positions differ from their places; None: all are 0.

    Raises:
        ValueError: a sequence's old log-probabilities do not match its trained tokens, or the row
            does not divide by the number of ranks.
    """
    entries = row_entries(layout, sequences)
    row = rank_row(
        layout,
        rank=rank,
        num_ranks=num_ranks,
        comm_types=comm_types,
        needed=entries.positions if trim_last_layer else None,
        multiple=output_multiple,
        window=window,
        recurrence_width=recurrence_width,
    )
    predictions = ()
    if prediction is not None:
        predictions = plan_predictions(
            layout,
            sequences,
            prediction,
            rank=rank,
            num_ranks=num_ranks,
            comm_types=comm_types,
            window=window,
        )
    positions = None
    if position_shifts:
        positions = layout.scatter_inputs(position_shifts) + layout.position_ids[:, None]
    return host_batch(
        row,
        entries,
        num_sequences=len(sequences),
        router_losses=router_losses,
        predictions=predictions,
        # A row without sequences is padding, which may go anywhere.
        routes=scatter_routes(layout, routes) if routes else None,
        mrope_positions=positions,
    )


def build_batch(
    layout: PackedLayout,
    sequences: Sequence[TrainedSequence],
    setup: AttentionSetup,
    *,
    trim_last_layer: bool = False,
    output_multiple: int = 1,
    router_losses: RouterLossScale | None = None,
    prediction: PredictionPlan | None = None,
) -> PackedBatch:
    """A microbatch on the device: `plan_batch`, then `to_device`."""
    host = plan_batch(
        layout,
        sequences,
        rank=setup.rank,
        num_ranks=setup.num_ranks,
        comm_types=setup.comm_types,
        window=setup.window,
        recurrence_width=setup.recurrence_width,
        trim_last_layer=trim_last_layer,
        output_multiple=output_multiple,
        router_losses=router_losses,
        prediction=prediction,
    )
    return to_device(host, setup)
