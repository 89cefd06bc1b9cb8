"""The batch description that travels through GPTModel to every attention layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_prefix.attention.exchange import Exchange
from megatron_prefix.attention.root_keys import RootKeys
from megatron_prefix.attention.row_attention import AttentionSetup, CoreAttention, RowAttention
from megatron_prefix.attention.row_recurrence import RowPaths, RowRecurrence
from megatron_prefix.device_copy import copy_to_device, record_to_device
from megatron_prefix.layout import (
    ContextShards,
    ModelRow,
    PackedLayout,
    RankRow,
    own_values,
    rank_row,
)
from megatron_prefix.megatron.borrowed import OneRank

if TYPE_CHECKING:
    from megatron_prefix.layers.predictions import PredictionDepth


@dataclass(frozen=True, kw_only=True)
class RouterLossScale:
    """What losses of routers are divided by and multiplied by; they are means over tokens."""

    num_tokens: int
    """Of all sequences of the microbatch, on all ranks that hold a part of it: a token counts once
    for each of its sequences."""
    factor: float
    """Of the mean. With Megatron's division by the number of microbatches, and its mean over
    data-parallel ranks, it is 1; where gradients are only added up, 1 / (microbatches of a rank
    * data-parallel ranks)."""


@dataclass(kw_only=True)
class PrefixPackedSeqParams(PackedSeqParams):
    """`PackedSeqParams` of one packed row in which prefixes are shared.

    Under context parallelism it describes this rank's part of the row; T are the tokens of that
    part. To Megatron it is one packed sequence of T tokens (`cu_seqlens = [0, T]`); the fields it
    adds are what our layers read. `max_seqlen_*` are the longest logical path, since GPTModel sizes
    its RoPE table by them.
    """

    attention: CoreAttention
    """The core attention of every layer: for a packed row a `RowAttention`, with its kernel."""
    position_ids: Tensor
    """[T] int64: each token's position in its own sequence."""
    mrope_position_ids: Tensor | None = None
    """[3, T] int64: time, height and width of each token, for a model with mRoPE; None: any other
    model."""
    own_rows: np.ndarray
    """[T] int64: position in the packed row of each token; -1 on padding that context parallelism
    has moved."""
    multiplicity: Tensor | None = None
    """[T] int64: sequences that run through each token, 0 on padding; None: it is not trained."""
    router_losses: RouterLossScale | None = None
    """Needed to train a model whose routers have losses of their own."""
    shards: ContextShards | None = None
    """How the row is distributed over context-parallel ranks; None: all of it is here."""
    last_layer: PrefixPackedSeqParams | None = None
    """Params of the model's last layer, where it computes the output of some rows only."""
    recurrence: RowPaths | None = None
    """The paths of the tokens, for recurrent layers."""
    routes: Tensor | None = None
    """[T, layers with experts, topk] whole numbers: the experts that each token is sent to, or
    [N, ...] in params of a trimmed last layer. None: the routers choose."""
    query_rows: Tensor | None = None
    """[N] int64 ascending, in params of a trimmed last layer: the rows that attend."""
    query_rows_host: np.ndarray | None = None
    """The same on the host."""
    predictions: tuple[PredictionDepth, ...] | None = None
    """For multi-token prediction, from its first depth on; None: it is left out."""

    @classmethod
    def from_layout(
        cls,
        layout: PackedLayout,
        setup: AttentionSetup,
        *,
        needed: np.ndarray | None = None,
        multiple: int = 1,
        mrope_positions: np.ndarray | None = None,
        router_losses: RouterLossScale | None = None,
        routes: np.ndarray | None = None,
    ) -> PrefixPackedSeqParams:
        """Params of a packed layout, or of this rank's part of it, with tensors on the device.

        Not collective. Context-parallel ranks that have different rows wait for each other for
        ever; `check_same_row` compares them.

        Args:
            layout: the packed row, the same on every rank of the setup's group; its length a
                multiple of the group's size.
            setup: of the model.
            needed: [n] int64 positions of the packed row whose output is needed; then the model
                puts out `output_rows` only. None: the model's output has all T rows.
            multiple: the number of output rows is a multiple of this: the tensor-parallel size,
                under sequence parallelism.
            mrope_positions: [3, T] of the whole row, from `layout.scatter`, for a model with mRoPE;
                None: all three are `layout.position_ids`, as of text.
            router_losses: see the field.
            routes: [T, layers, topk] of the whole row, from `routes_of_row`, to replay.

        Raises:
            ValueError: the row does not divide by the group's size.
        """
        row = rank_row(
            layout,
            rank=setup.rank,
            num_ranks=setup.num_ranks,
            comm_types=setup.comm_types,
            needed=needed,
            multiple=multiple,
            window=setup.window,
            recurrence_width=setup.recurrence_width,
        )
        tensors = record_to_device(row.model, setup.device)
        own = None
        if routes is not None:
            (own,) = copy_to_device([own_routes(routes, row.rows)], setup.device)
        params = cls.from_row(row, tensors, setup, router_losses=router_losses, routes=own)
        if mrope_positions is not None:
            if mrope_positions.shape != (3, layout.num_tokens):
                raise ValueError(
                    f"mrope_positions {mrope_positions.shape}: expected (3, {layout.num_tokens}), "
                    "time, height and width of each token of the row"
                )
            params.set_mrope_positions(params.own(mrope_positions.T).T.contiguous())
        return params

    @classmethod
    def from_row(
        cls,
        row: RankRow,
        tensors: ModelRow[Tensor],
        setup: AttentionSetup,
        *,
        root: RootKeys | None = None,
        keeps_root: bool = False,
        router_losses: RouterLossScale | None = None,
        routes: Tensor | None = None,
        mrope_positions: Tensor | None = None,
    ) -> PrefixPackedSeqParams:
        """Params of a rank's row.

        Args:
            row: on the host.
            tensors: `row.model` on the device.
            setup: of the model.
            root: of the series that the row belongs to, if it does.
            keeps_root: whether it is the series' first row.
            router_losses: see the field.
            routes: [T, layers, topk] of this rank's tokens, from `own_routes`.
            mrope_positions: [3, T] of this rank's tokens, for a model with mRoPE; None: all three
                are `position_ids`.
        """
        exchange = None
        if row.shards is not None:
            exchange = Exchange(setup.context_parallel_group, row.shards.shard_tokens.tolist())
        attention = RowAttention(
            stages=tensors.stages,
            kernel=setup.kernel,
            deterministic=setup.deterministic,
            exchange=exchange,
            window=setup.window,
            root=root,
            keeps_root=keeps_root,
        )
        recurrence = None
        if setup.recurrence_width is not None:
            recurrence = RowRecurrence(
                own=tensors.recurrence,
                whole_row=tensors.stages.whole_row,
                exchange=exchange,
                root=root,
                keeps_root=keeps_root,
                delta_rule=setup.delta_rule,
            )
        params = cls(
            qkv_format="thd",
            cu_seqlens_q=tensors.stages.cu_seqlens_q,
            cu_seqlens_kv=tensors.stages.cu_seqlens_q,
            max_seqlen_q=row.max_seqlen,
            max_seqlen_kv=row.max_seqlen,
            attention=attention,
            position_ids=tensors.position_ids,
            own_rows=row.rows,
            multiplicity=tensors.multiplicity,
            router_losses=router_losses,
            recurrence=recurrence,
            shards=row.shards,
            routes=routes,
        )
        last = tensors.last_stages
        if last is not None:
            params.last_layer = dataclasses.replace(
                params,
                attention=dataclasses.replace(attention, stages=last),
                cu_seqlens_q=last.cu_seqlens_q,
                query_rows=last.queries,
                query_rows_host=row.output_rows,
                routes=None if routes is None else routes[last.queries],
            )
        if mrope_positions is None and setup.mrope:
            mrope_positions = tensors.position_ids.expand(3, -1)
        if mrope_positions is not None:
            params.set_mrope_positions(mrope_positions)
        return params

    def without_routes(self) -> PrefixPackedSeqParams:
        """The same batch, whose tokens the routers send where they choose."""
        last = self.last_layer
        return dataclasses.replace(self, routes=None, last_layer=last and last.without_routes())

    def set_mrope_positions(self, positions: Tensor) -> None:
        """Give a model with mRoPE the time, height and width of this rank's tokens, [3, T]."""
        for params in (self, self.last_layer):
            if params is not None:
                params.mrope_position_ids = positions
                if self.shards is not None:
                    # Otherwise Megatron's embedding takes a slice of what is this rank's already.
                    params.cp_group = OneRank()

    @property
    def model_position_ids(self) -> Tensor:
        """What the model takes as `position_ids`: [1, T], or [3, 1, T] with mRoPE."""
        if self.mrope_position_ids is not None:
            return self.mrope_position_ids[:, None]
        return self.position_ids[None]

    @property
    def output_rows(self) -> np.ndarray:
        """[N] int64 ascending: which of this rank's T tokens the rows of the model's output are."""
        if self.last_layer is None:
            return np.arange(len(self.own_rows))
        return self.last_layer.query_rows_host

    def own(self, values: np.ndarray) -> Tensor:
        """This rank's part of a row's values, such as `layout.input_ids`; 0 on padding.

        Args:
            values: [tokens of the whole row, ...]

        Returns:
            [T, ...], on the params' device.
        """
        return copy_to_device([own_values(values, self.own_rows)], self.position_ids.device)[0]


def own_routes(routes: np.ndarray, own_rows: np.ndarray) -> np.ndarray:
    """[T, layers, topk] a rank's part of a packed row's routes; padding goes to the first experts.

    Args:
        routes: of the whole row, [tokens, layers, topk].
        own_rows: of the rank, see `PrefixPackedSeqParams.own_rows`.
    """
    own = own_values(routes, own_rows)
    own[own_rows < 0] = np.arange(routes.shape[-1])
    return own
