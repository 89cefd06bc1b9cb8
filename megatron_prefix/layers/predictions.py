"""What multi-token prediction reads of a packed row, depth after depth, and how rows move between.

Depth k attends to the row of shift k, and its output is put at the positions of shift k + 1 (see
`layout/predictions.py`). The first depth's row is the model's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_prefix.attention.exchange import exchanged_rows
from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.device_copy import record_to_device
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layout import PackedLayout
from megatron_prefix.layout.predictions import (
    DepthArrays,
    DepthPlan,
    RowMoves,
    plan_depths,
    shifted_layouts,
)


@dataclass(kw_only=True, eq=False)
class PredictionDepth(PackedSeqParams):
    """One depth of prediction, on this rank. C: tokens of the rank's row.

    An MTP layer gets it in the place of a batch's params.
    """

    params: PrefixPackedSeqParams
    """Of the layer inside."""
    tokens: Tensor
    """[1, C] int64: what it reads beside the output of the depth before."""
    token_positions: Tensor
    """[1, C] int64: of these tokens in their sequences."""
    moves: RowMoves[Tensor]
    group: dist.ProcessGroup | None
    """The context-parallel ranks; None: all rows are here."""
    labels: Tensor
    """[C] int64: what is predicted; 0 on padding."""
    multiplicity: Tensor
    """[C] int64: sequences that each prediction counts for; 0 on padding."""
    hidden: Tensor | None = None
    """[C, 1, h], or [C/tp, 1, h] under sequence parallelism: what is predicted from. The model's
    forward leaves it here; whoever computes a loss of it takes it out with `taken`."""

    def taken(self) -> Tensor:
        """The hidden states, which are not kept any longer."""
        hidden, self.hidden = self.hidden, None
        assert hidden is not None, "the model has not run"
        return hidden

    def moved(self, hidden: Tensor, *, sequence_parallel: bool) -> Tensor:
        """The layer's output at the positions of its loss.

        Args:
            hidden: [C, 1, h], or [C/tp, 1, h] under sequence parallelism; so is what is returned.
        """
        if sequence_parallel:
            # Every rank computes the same moves of all rows, and has the same gradient of them.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        if self.moves.send is not None:
            assert self.group is not None
            hidden = _SentRows.apply(
                # Plain indexing: on CUDA its backward adds copies up in a fixed order.
                hidden[self.moves.send],
                self.moves.sent,
                self.moves.received,
                self.group,
            )
        hidden = hidden[self.moves.take]
        return scatter_to_sequence_parallel_region(hidden) if sequence_parallel else hidden


def prediction_depths(
    params: PrefixPackedSeqParams,
    plans: Sequence[DepthPlan],
    tensors: Sequence[DepthArrays[Tensor]],
    setup: AttentionSetup,
) -> tuple[PredictionDepth, ...]:
    """The depths of a batch.

    Args:
        params: of the batch; all rows of its last layer are computed.
        plans: on the host.
        tensors: their arrays on the device.
        setup: of the model.
    """
    if params.last_layer is not None:
        raise ValueError(
            "needed: multi-token prediction reads all rows of the last layer; make the params of "
            "the batch without needed"
        )
    found = []
    # The layers inside attend, also where the model has others that are recurrent.
    setup = dataclasses.replace(setup, recurrence_width=None)
    for shift, (plan, arrays) in enumerate(zip(plans, tensors, strict=True), start=1):
        if shift == 1:
            # The routers of these layers are not among those that routes are replayed to.
            of_depth = dataclasses.replace(params, routes=None, predictions=None)
        else:
            of_depth = PrefixPackedSeqParams.from_row(plan.row, arrays.model, setup)
        # Routers learn from what predicts a token, as often as it does.
        of_depth.multiplicity = arrays.predictions
        if params.router_losses is not None:
            of_depth.router_losses = dataclasses.replace(
                params.router_losses, num_tokens=max(plan.num_predictions, 1)
            )
        # The model's table of position embeddings is as long as the first row's sequences.
        of_depth.max_seqlen_q, of_depth.max_seqlen_kv = params.max_seqlen_q, params.max_seqlen_kv
        found.append(
            PredictionDepth(
                params=of_depth,
                tokens=arrays.tokens[None],
                token_positions=(of_depth.position_ids + shift)[None],
                moves=arrays.moves,
                group=setup.context_parallel_group,
                labels=arrays.labels,
                multiplicity=arrays.multiplicity,
            )
        )
    return tuple(found)


def add_predictions(
    params: PrefixPackedSeqParams, layout: PackedLayout, setup: AttentionSetup, depths: int
) -> None:
    """Give params of a layout what a model that predicts further tokens needs.

    Args:
        params: of the layout, with all its rows.
        layout: the packed row.
        setup: of the model.
        depths: of prediction, `mtp_num_layers`.
    """
    plans = plan_depths(
        shifted_layouts(layout, depths),
        rank=setup.rank,
        num_ranks=setup.num_ranks,
        comm_types=setup.comm_types,
        window=setup.window,
    )
    tensors = record_to_device(tuple(plan.arrays for plan in plans), setup.device)
    params.predictions = prediction_depths(params, plans, tensors, setup)


class _SentRows(torch.autograd.Function):
    """Rows to and from the ranks of a group; their gradients go the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        sent: tuple[int, ...],
        received: tuple[int, ...],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.way_back = received, sent, group
        return exchanged_rows(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return exchanged_rows(gradient, *ctx.way_back), None, None, None
