"""The microbatches of a rank on the host: from the plan of a step and the rank's tokens to rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.layers.packed_seq_params import RouterLossScale
from megatron_prefix.layout import (
    GroupSlice,
    Packing,
    PrefixTree,
    masked_labels,
    pack,
    rows_of,
)
from megatron_prefix.layout.prediction_cost import prediction_flops
from megatron_prefix.layout.tree_cost import node_flops
from megatron_prefix.training.batch import HostBatch
from megatron_prefix.training.batch_planning import plan_batch
from megatron_prefix.training.entries import TrainedSequence
from megatron_prefix.training.predicted import PredictionPlan
from megatron_prefix.training.series import HostSeries
from megatron_prefix.training.shares import Share
from megatron_prefix.training.step_plan import StepPlan


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedMicrobatch:
    """A microbatch on the host, and what it costs."""

    batch: HostBatch | HostSeries
    tokens: int
    """Of its packed rows on all context-parallel ranks, padding included."""
    flops: int
    """Forward FLOPs of these rows."""
    prediction_flops: int = 0
    """Of them those of multi-token prediction, which runs in training only."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Row:
    """What one row is made of."""

    tree: PrefixTree
    sequences: Sequence[TrainedSequence]
    """Of the tree."""
    routes: Sequence[np.ndarray] | None
    """Of the tree's sequences, see `plan_batch`; so are `position_shifts`."""
    position_shifts: Sequence[np.ndarray] | None
    flops: int
    """Forward FLOPs of what the row runs."""
    prediction_flops: int = 0
    """See `PlannedMicrobatch`."""
    root_elsewhere: bool = False
    """Another row runs the tree's root, node 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowPlanner:
    """Plans microbatches of one optimizer step. It touches no device and asks no other rank."""

    step: StepPlan
    share: Share
    """Holds the responses of the microbatches that are planned."""
    packing: Packing
    attention: AttentionSetup

    def plan(self, slices: Sequence[GroupSlice]) -> PlannedMicrobatch:
        """The microbatch of these slices: one row, or a series of rows."""
        rows = self._rows(slices)
        scale = self._router_loss_scale(slices)
        planned = [self._plan_row(row, scale) for row in rows]
        if len(rows) == 1:
            return planned[0]
        root, *parts = (row.batch for row in planned)
        return PlannedMicrobatch(
            batch=HostSeries(root=root, root_tokens=rows[0].tree.grouped_tokens, parts=parts),
            tokens=sum(row.tokens for row in planned),
            flops=sum(row.flops for row in planned),
        )

    def _router_loss_scale(self, slices: Sequence[GroupSlice]) -> RouterLossScale:
        """Routers' losses are a mean over the step's microbatches, of means over their tokens."""
        tokens = 0
        for part in slices:
            lengths = self.step.units[part.group].sequence_lengths[list(part.sequences)]
            tokens += int((lengths - 1).sum())
        microbatches = self.step.microbatches.num_microbatches * self.packing.data_parallel_size
        # A microbatch without sequences adds nothing, whatever its sum is divided by.
        return RouterLossScale(num_tokens=max(tokens, 1), factor=1 / microbatches)

    def _plan_row(self, row: _Row, router_losses: RouterLossScale) -> PlannedMicrobatch:
        attention, packing = self.attention, self.packing
        layout = pack(
            row.tree,
            pad_to_multiple=packing.pad_to_multiple,
            root_elsewhere=row.root_elsewhere,
        )
        batch = plan_batch(
            layout,
            row.sequences,
            rank=attention.rank,
            num_ranks=attention.num_ranks,
            comm_types=attention.comm_types,
            window=attention.window,
            recurrence_width=attention.recurrence_width,
            trim_last_layer=packing.trim_last_layer,
            output_multiple=packing.pad_to_multiple // attention.num_ranks,
            router_losses=router_losses,
            prediction=self._prediction(),
            routes=row.routes,
            position_shifts=row.position_shifts,
        )
        return PlannedMicrobatch(
            batch=batch,
            tokens=layout.num_tokens,
            flops=row.flops,
            prediction_flops=row.prediction_flops,
        )

    def _prediction(self) -> PredictionPlan | None:
        predictions = self.packing.model_shape.predictions
        if predictions is None:
            return None
        step_tokens = max(self.step.trained_tokens, 1)
        return PredictionPlan(depths=predictions.depths, step_tokens=step_tokens)

    def _rows(self, slices: Sequence[GroupSlice]) -> list[_Row]:
        """What each row of a microbatch holds; a series begins with its root."""
        if not any(part.parts for part in slices):
            return [self._row(self._tree(slices), slices)]
        parts = [
            self._row(self.packing.series_row(self._with_tokens(part)), [part], root_elsewhere=True)
            for (part,) in rows_of(slices)
        ]
        root = parts[0].tree.tokens[0]
        none = TrainedSequence(first_trained=len(root), weight=0.0, advantage=0.0)
        # As often as sequences run through it, for what is counted by multiplicity.
        count = sum(row.tree.num_sequences for row in parts)
        tree, nothing = PrefixTree.from_sequences([root] * count), [none] * count
        flops = self._node_flops(tree, nothing)[0][0]
        routes, shifts = (
            values and [values[0][: len(root) - 1]] * count
            for values in (parts[0].routes, parts[0].position_shifts)
        )
        of_root = _Row(
            tree=tree, sequences=nothing, routes=routes, position_shifts=shifts, flops=flops
        )
        return [of_root, *parts]

    def _row(
        self, tree: PrefixTree, slices: Sequence[GroupSlice], *, root_elsewhere: bool = False
    ) -> _Row:
        responses = [
            (self.step.group_of_unit[part.group], response)
            for part in slices
            for response in self._responses(part)
        ]
        sequences = [self._trained_sequence(group, response) for group, response in responses]
        routes = None
        if self.share.routes is not None:
            routes = [self.share.routes_of(response) for _, response in responses]
        shifts = [self.share.position_shifts_of(group, response) for group, response in responses]
        flops, predicted = self._node_flops(tree, sequences)
        return _Row(
            tree=tree,
            sequences=sequences,
            routes=routes,
            position_shifts=[found[:-1] for found in shifts if found is not None] or None,
            flops=sum(flops[1:] if root_elsewhere else flops),
            prediction_flops=sum(predicted),
            root_elsewhere=root_elsewhere,
        )

    def _node_flops(
        self, tree: PrefixTree, sequences: Sequence[TrainedSequence]
    ) -> tuple[list[int], list[int]]:
        """[nodes] of all layers, and of them those of multi-token prediction."""
        labels, spans = masked_labels(
            tree,
            [sequence.first_trained for sequence in sequences],
            [sequence.loss_mask for sequence in sequences],
        )
        shape = self.packing.model_shape
        flops = node_flops(
            shape,
            tree,
            labels=labels,
            spans=spans,
            trim_last_layer=self.packing.trim_last_layer,
        )
        return flops, [of.total for of in prediction_flops(shape, tree, labels)]

    def _tree(self, slices: Sequence[GroupSlice]) -> PrefixTree:
        """The tree of a row, with the tokens of its slices' sequences."""
        trees = {part.group: self._with_tokens(part) for part in slices}
        renumbered = [
            GroupSlice(group=part.group, sequences=tuple(range(len(part.sequences))))
            for part in slices
        ]
        return self.packing.microbatch(trees, renumbered)

    def _with_tokens(self, part: GroupSlice) -> PrefixTree:
        """The tree of a slice's sequences."""
        group, responses = self.step.group_of_unit[part.group], self._responses(part)
        keys = [self.share.sequence_keys(group, response) for response in responses]
        return PrefixTree.of_shape(
            self.step.units[part.group].subset(part.sequences),
            [self.share.sequence(group, response) for response in responses],
            keys=[found for found in keys if found is not None] or None,
        )

    def _responses(self, part: GroupSlice) -> list[int]:
        """The responses that a slice's sequences end in, as indices into the batch."""
        of_unit = self.step.responses_of_unit[part.group]
        return [of_unit[i] for i in part.sequences]

    def _trained_sequence(self, group: int, response: int) -> TrainedSequence:
        in_step = response - self.step.first_response
        return TrainedSequence(
            first_trained=int(self.step.prompt_lengths[group]),
            weight=float(self.step.weights[in_step]),
            advantage=float(self.step.advantages[in_step]),
            token_advantages=self.share.advantages_of(response),
            old_logprobs=self.share.old_logprobs_of(response),
            loss_mask=self.share.loss_mask_of(response),
        )
