"""One microbatch of a rank: on the host as NumPy, and on the device as tensors.

Legend: T tokens of the row, N labelled positions (where some sequence trains on the label),
E entries. A position that several sequences share is one label and several entries.

Under context parallelism all of these are what this rank holds of the row.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Generic

import numpy as np
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.attention.root_keys import RootKeys
from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.device_copy import record_to_device
from megatron_prefix.layers.packed_seq_params import (
    PrefixPackedSeqParams,
    RouterLossScale,
    own_routes,
)
from megatron_prefix.layers.predictions import prediction_depths
from megatron_prefix.layout import ModelRow, RankRow, own_values
from megatron_prefix.layout.stages import Array
from megatron_prefix.training.entries import RowEntries
from megatron_prefix.training.predicted import (
    HostPredictions,
    PredictedTokens,
    PredictionArrays,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedEntries(Generic[Array]):
    """What is trained on in this rank's row."""

    label_positions: Array
    """[N] int64: rows of the model's output whose label is trained on, ascending."""
    labels: Array
    """[N] int64"""
    entry_labels: Array
    """[E] int64: index into the N labels."""
    sequence_ids: Array
    """[E] int64: sequence of this microbatch, 0 .. num_sequences - 1."""
    sequence_tokens: Array
    """[E] int64: which of its sequence's trained tokens each is, from 0."""
    weights: Array
    """[E] float64"""
    advantages: Array
    """[E] float64"""
    old_logprobs: Array | None
    """[E] float64; None: not known yet."""


BatchArrays = tuple[
    ModelRow[Array],
    TrainedEntries[Array],
    Array | None,
    Array | None,
    tuple[PredictionArrays[Array], ...],
]
"""The row, what is trained on in it, its routes, its positions, and what each depth of prediction
reads."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HostBatch:
    """A microbatch of this rank on the host, all of it NumPy."""

    row: RankRow
    entries: TrainedEntries[np.ndarray]
    num_sequences: int
    router_losses: RouterLossScale | None = None
    predictions: tuple[HostPredictions, ...] = ()
    """Of a model with multi-token prediction, by depth."""
    routes: np.ndarray | None = None
    """[T, layers with experts, topk] the experts that each token is sent to; None: the routers
    choose."""
    mrope_positions: np.ndarray | None = None
    """[3, T] int64: time, height and width of each token; None: all are its place, or the model
    has no mRoPE."""

    @property
    def arrays(self) -> BatchArrays[np.ndarray]:
        """All that goes to the device."""
        predictions = tuple(of_depth.arrays for of_depth in self.predictions)
        positions = self.mrope_positions
        return self.row.model, self.entries, self.routes, positions, predictions


@dataclass(kw_only=True)
class PackedBatch:
    """A microbatch on the device. Log-probabilities may be filled later, [E] each.

    Fields that `TrainedEntries` has too are described there.
    """

    input_ids: Tensor
    """[1, T] int64"""
    params: PrefixPackedSeqParams
    label_positions: Tensor
    labels: Tensor
    entry_labels: Tensor
    sequence_ids: Tensor
    sequence_tokens: Tensor
    weights: Tensor
    advantages: Tensor
    num_sequences: int
    context_parallel_group: dist.ProcessGroup | None = None
    """The ranks that the row is distributed over; None: all of it is here."""
    old_logprobs: Tensor | None = None
    """Of the policy that sampled, as rollouts bring them; or of the trainer's own old policy, which
    is the same without a correction."""
    recomputed_logprobs: Tensor | None = None
    """Of the trainer's own old policy, where a correction tells the two apart."""
    reference_logprobs: Tensor | None = None
    predicted: tuple[PredictedTokens[Tensor], ...] = ()
    """What `params.predictions` train on, by depth."""

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.input_ids.shape[1]

    @property
    def rows(self) -> tuple[PackedBatch, ...]:
        """The rows that something is trained on: this one."""
        return (self,)


def host_batch(
    row: RankRow,
    entries: RowEntries,
    *,
    num_sequences: int,
    router_losses: RouterLossScale | None = None,
    predictions: tuple[HostPredictions, ...] = (),
    routes: np.ndarray | None = None,
    mrope_positions: np.ndarray | None = None,
) -> HostBatch:
    """A microbatch of what is trained on in a rank's part of a row.

    Args:
        row: of the rank.
        entries: of the whole packed row.
        num_sequences: of the packed row.
        router_losses: see `PrefixPackedSeqParams`.
        predictions: of the rank, see `HostBatch`.
        routes: of the whole packed row, see `HostBatch`.
        mrope_positions: [tokens, 3] of the whole packed row.
    """
    # Where this rank has each position of the packed row, -1 for those of other ranks.
    last = int(max(row.rows.max(initial=-1), entries.positions.max(initial=-1)))
    places = np.full(last + 1, -1, dtype=np.int64)
    places[row.rows[row.rows >= 0]] = np.flatnonzero(row.rows >= 0)
    entries = entries.select(places[entries.positions] >= 0)
    label_rows, entry_labels = np.unique(places[entries.positions], return_inverse=True)
    return HostBatch(
        row=row,
        entries=TrainedEntries(
            label_positions=np.searchsorted(row.output_rows, label_rows),
            labels=row.labels[label_rows],
            entry_labels=entry_labels.reshape(-1),
            sequence_ids=entries.sequences,
            sequence_tokens=entries.tokens,
            weights=entries.weights,
            advantages=entries.advantages,
            old_logprobs=entries.old_logprobs,
        ),
        num_sequences=num_sequences,
        router_losses=router_losses,
        predictions=predictions,
        routes=None if routes is None else own_routes(routes, row.rows),
        mrope_positions=(
            None
            if mrope_positions is None
            else np.ascontiguousarray(own_values(mrope_positions, row.rows).T)
        ),
    )


def to_device(host: HostBatch, setup: AttentionSetup) -> PackedBatch:
    """The microbatch on the device, in one copy.

    Args:
        host: planned for the setup's rank and kinds of communication.
        setup: of the model.
    """
    return packed_batch(host, record_to_device(host.arrays, setup.device), setup)


def packed_batch(
    host: HostBatch,
    tensors: BatchArrays[Tensor],
    setup: AttentionSetup,
    *,
    root: RootKeys | None = None,
    keeps_root: bool = False,
) -> PackedBatch:
    """A microbatch whose arrays are on the device.

    Args:
        host: what was planned.
        tensors: `host.arrays` on the device.
        setup: of the model.
        root, keeps_root: see `PrefixPackedSeqParams.from_row`.
    """
    model, entries, routes, positions, predictions = tensors
    params = PrefixPackedSeqParams.from_row(
        host.row,
        model,
        setup,
        root=root,
        keeps_root=keeps_root,
        router_losses=host.router_losses,
        routes=routes,
        mrope_positions=positions,
    )
    if host.predictions:
        params.predictions = prediction_depths(
            params,
            [of_depth.plan for of_depth in host.predictions],
            [arrays for arrays, _ in predictions],
            setup,
        )
    return PackedBatch(
        input_ids=model.input_ids[None],
        params=params,
        predicted=tuple(tokens for _, tokens in predictions),
        num_sequences=host.num_sequences,
        context_parallel_group=setup.context_parallel_group,
        **{field.name: getattr(entries, field.name) for field in dataclasses.fields(entries)},
    )
