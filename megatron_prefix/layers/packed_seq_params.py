"""The batch description that travels through GPTModel to every attention layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_prefix.attention.comm_types import CommType
from megatron_prefix.attention.context_parallel import ContextParallelPlan
from megatron_prefix.attention.function import prefix_attention
from megatron_prefix.attention.kernels import select_kernel
from megatron_prefix.attention.stages import AttentionPlan
from megatron_prefix.device_copy import copy_to_device
from megatron_prefix.distributed.agreement import check_equal_across_ranks
from megatron_prefix.layout import PackedLayout, rows_to_keep, shard_layout


@dataclass
class PrefixPackedSeqParams(PackedSeqParams):
    """`PackedSeqParams` of one packed row in which prefixes are shared.

    Under context parallelism it describes this rank's part of the row; T are the tokens of that
    part. To Megatron it is one packed sequence of T tokens (`cu_seqlens = [0, T]`); the fields it
    adds are what our attention reads. `max_seqlen_*` are the longest logical path, since GPTModel
    sizes its RoPE table by them.
    """

    plan: AttentionPlan | ContextParallelPlan = None
    """The attention stages of the row."""
    position_ids: Tensor = None
    """[T] int64: each token's position in its own sequence."""
    kernel: str | None = None
    """Attention kernel by name; None takes the best for the device."""
    deterministic: bool = False
    """The same batch gives the same gradients of attention, to the bit; see `select_kernel`."""
    last_layer: PrefixPackedSeqParams | None = None
    """Params of the model's last layer, where it computes the output of some rows only."""
    query_rows: Tensor | None = None
    """[N] int64 ascending, in params of a trimmed last layer: the rows that attend."""
    query_rows_host: np.ndarray | None = None
    """The same on the host."""

    @classmethod
    def from_layout(
        cls,
        layout: PackedLayout,
        device: torch.device,
        *,
        kernel: str | None = None,
        deterministic: bool = False,
        context_parallel_group: dist.ProcessGroup | None = None,
        check_equal: bool = True,
    ) -> PrefixPackedSeqParams:
        """Params of a packed layout, with its tensors on `device`.

        Args:
            layout: the packed row, the same on every rank of the group; its length a multiple of
                the group's size.
            device: of the model.
            kernel: attention kernel by name; None takes the best for the device.
            deterministic: the same batch gives the same gradients of attention, to the bit.
            context_parallel_group: the ranks that the row is distributed over; None, or a group of
                one, for the whole row here.
            check_equal: compare the ranks' plans (a small collective), since different ones would
                let them wait for each other. False where the caller has seen to it.

        Raises:
            ValueError: the row does not divide by the group's size.
            RuntimeError: the ranks have different rows; it shows all of them.
        """
        size = 1 if context_parallel_group is None else dist.get_world_size(context_parallel_group)
        if size == 1:
            plan = AttentionPlan.from_layout(layout, device)
        else:
            shards = shard_layout(layout, size)
            if check_equal:
                check_equal_across_ranks(
                    "the packed row", shards.summary(), group=context_parallel_group
                )
            plan = ContextParallelPlan(shards, context_parallel_group, device)
        cu_seqlens, position_ids = copy_to_device(
            [
                np.array([0, plan.num_tokens], dtype=np.int32),
                _own(plan, layout.position_ids),
            ],
            device,
        )
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=layout.max_seqlen,
            max_seqlen_kv=layout.max_seqlen,
            plan=plan,
            position_ids=position_ids,
            kernel=kernel,
            deterministic=deterministic,
        )

    def trim_last_layer(self, needed: np.ndarray, *, multiple: int = 1) -> np.ndarray:
        """Let the model's last layer, and so the model, put out only the rows that are needed.

        Args:
            needed: [n] int64 rows of this rank's T tokens.
            multiple: the number of rows that are put out is a multiple of this: the
                tensor-parallel size, under sequence parallelism.

        Returns:
            [N] int64, ascending: the rows that are put out, the needed ones among them. (From a
            segment's first needed row all to its end are, and others to fill up.)
        """
        is_needed = np.zeros(self.plan.num_tokens, dtype=bool)
        is_needed[needed] = True
        kept = rows_to_keep(self.plan.self_stage, is_needed, multiple=multiple)
        rows = np.flatnonzero(kept)
        if len(rows) == len(kept):
            self.last_layer = None
            return rows
        cu_seqlens_q, query_rows = copy_to_device(
            [np.array([0, len(rows)], dtype=np.int32), rows], self.position_ids.device
        )
        self.last_layer = dataclasses.replace(
            self,
            plan=self.plan.trimmed(kept),
            cu_seqlens_q=cu_seqlens_q,
            query_rows=query_rows,
            query_rows_host=rows,
            last_layer=None,
        )
        return rows

    @property
    def own_rows(self) -> np.ndarray:
        """[T] int64: position in the packed row of each of this rank's tokens; -1 on padding that
        context parallelism has moved."""
        if isinstance(self.plan, ContextParallelPlan):
            return self.plan.rows
        return np.arange(self.plan.num_tokens)

    def own(self, row: np.ndarray) -> Tensor:
        """This rank's part of a row's values, such as `layout.input_ids`; 0 on padding.

        Args:
            row: [tokens of the whole row, ...]

        Returns:
            [T, ...], on the params' device.
        """
        return copy_to_device([self.own_values(row)], self.position_ids.device)[0]

    def own_values(self, row: np.ndarray) -> np.ndarray:
        """The same as an array on the host."""
        return _own(self.plan, row)

    def attend(
        self,
        layer_number: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        comm_type: CommType,
    ) -> Tensor:
        """The core attention of one layer. A subclass may keep k and v, or add earlier ones.

        Args:
            layer_number: of the layer in the whole model, from 1.
            q: [T, heads, dim], or [N, heads, dim] in a trimmed last layer, rotated; k and v:
                [T, kv heads, dim], k rotated.
            scale: factor of q k^T before the softmax.
            comm_type: the layer's kind of context-parallel communication.

        Returns:
            Shaped like q, in its dtype.
        """
        kernel = select_kernel(
            self.kernel,
            device=q.device,
            dtype=q.dtype,
            head_dim=q.shape[-1],
            deterministic=self.deterministic,
        )
        how = {"scale": scale, "kernel": kernel, "deterministic": self.deterministic}
        if isinstance(self.plan, ContextParallelPlan):
            return self.plan.attend(comm_type, layer_number, q, k, v, **how)
        return prefix_attention(q, k, v, self.plan, **how)


def _own(plan: AttentionPlan | ContextParallelPlan, row: np.ndarray) -> np.ndarray:
    if isinstance(plan, ContextParallelPlan):
        row = row[plan.rows]
        row[plan.rows < 0] = 0
    return row
