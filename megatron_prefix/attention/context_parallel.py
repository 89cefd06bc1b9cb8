"""Exact attention with shared prefixes over a row that is distributed over ranks.

Every kind of communication (see `comm_types`) computes the same stages, merged by log-sum-exp as on
one rank. `all_gather` and `p2p` move the keys and values of the shards only: in forward while the
rank's own segments attend to themselves, and in backward again, so that none are kept.

Shapes: C tokens of this rank's row, of which the first n are its shard; N of them attend (all, but
for a trimmed last layer); T of all ranks' rows. H query heads, Hk key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_prefix.attention.comm_types import CommType
from megatron_prefix.attention.exchange import Exchange, Recorder, Traffic
from megatron_prefix.attention.function import (
    MergedAttention,
    StageCompute,
    check_shapes,
    prefix_attention,
)
from megatron_prefix.attention.kernels import Kernel
from megatron_prefix.attention.stages import AttentionPlan, StageTensors, stage_tensors
from megatron_prefix.device_copy import copy_to_device
from megatron_prefix.layout import AttentionStage, ContextShards, RankStages, trim_stages


class ContextParallelPlan:
    """The attention of one rank's row, for each kind of communication that is asked for."""

    kept: np.ndarray | None = None
    """[C] bool: the tokens that attend, in the plan of a trimmed last layer; None: all."""

    def __init__(
        self, shards: ContextShards, group: dist.ProcessGroup, device: torch.device
    ) -> None:
        """Plan this rank's row; stages are made when a layer first asks for their kind.

        Args:
            shards: of the row, the same on every rank of `group`.
            group: the context-parallel group.
            device: where q, k and v will be.
        """
        assert shards.num_ranks == dist.get_world_size(group)
        self.shards = shards
        self.device = device
        self.exchange = Exchange(group, shards.shard_tokens.tolist())
        self._stages = RankStages(shards, self.exchange.rank)
        self.rows = self._stages.rows()
        """[C] int64: position in the packed row of each token; -1 for padding."""

    def trimmed(self, kept: np.ndarray) -> ContextParallelPlan:
        """The plan of a layer in which only some of the rank's tokens attend.

        Args:
            kept: [C] bool, from `rows_to_keep`.
        """
        plan = ContextParallelPlan(self.shards, self.exchange.group, self.device)
        plan.exchange = self.exchange  # one count of the traffic
        plan.kept = kept
        return plan

    @property
    def num_tokens(self) -> int:
        """C, padding included."""
        return self.shards.tokens_per_rank

    @property
    def num_queries(self) -> int:
        """N: C, unless the plan is trimmed."""
        return self.num_tokens if self.kept is None else int(self.kept.sum())

    @property
    def self_stage(self) -> AttentionStage:
        """The causal squares over the rank's row."""
        return self._local_stages[0]

    @property
    def shard_tokens(self) -> int:
        """n: tokens at the beginning of the rank's row whose keys and values travel."""
        return self.exchange.shard_tokens[self.exchange.rank]

    @property
    def traffic(self) -> Traffic:
        """Bytes exchanged so far."""
        return self.exchange.traffic

    def attend(
        self,
        comm_type: CommType,
        layer_number: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        kernel: Kernel,
        deterministic: bool = False,
    ) -> Tensor:
        """Attention of this rank's queries. Collective over the group, backward too.

        Args:
            comm_type: the kind of communication.
            layer_number: what the traffic is counted under.
            q: [N, H, D]; k and v: [C, Hk, D].
            scale: factor of q k^T before the softmax.
            kernel: what computes a stage.
            deterministic: the same inputs give the same gradients, to the bit. The kernel must
                have been selected for it.

        Returns:
            [N, H, D] in q's dtype.
        """
        check_shapes(q, k, v, num_queries=self.num_queries, num_tokens=self.num_tokens)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        compute = StageCompute(kernel, scale, deterministic)
        if comm_type == "a2a":
            return self._attend_by_heads(layer_number, q, k, v, compute)
        function = {"all_gather": _GatheredAttention, "p2p": _RingAttention}[comm_type]
        return function.apply(q, k, v, self, layer_number, compute)

    def _attend_by_heads(
        self, layer_number: int, q: Tensor, k: Tensor, v: Tensor, compute: StageCompute
    ) -> Tensor:
        if self.kept is not None:  # heads are exchanged for all tokens of the row
            (kept,) = copy_to_device([np.flatnonzero(self.kept)], self.device)
            q = q.new_zeros(self.num_tokens, *q.shape[1:]).index_copy(0, kept, q)
        size = self.exchange.size
        heads = [x.shape[1] // size for x in (q, k, v)]
        # One message: rank i's query heads, key heads and value heads side by side.
        parts = [x.unflatten(1, (size, -1)) for x in (q, k, v)]
        row = _RowOfSomeHeads.apply(torch.cat(parts, dim=2), self, layer_number)
        out = prefix_attention(
            *row.split(heads, dim=1),
            self.whole_row,
            scale=compute.scale,
            kernel=compute.kernel,
            deterministic=compute.deterministic,
        )
        out = _AllHeadsOfSomeRows.apply(out, self, layer_number).flatten(1, 2)
        return out if self.kept is None else out[kept]

    @cached_property
    def local(self) -> tuple[StageTensors, ...]:
        """The self stage over the rank's row, then what else needs no communication."""
        return self._tensors(self._local_stages)

    @cached_property
    def _local_stages(self) -> tuple[AttentionStage, ...]:
        return self._stages.local()

    @cached_property
    def gathered(self) -> GatheredTensors:
        """The stages of `all_gather`."""
        gathered = self._stages.from_all_shards()
        (source,) = copy_to_device([gathered.source], self.device)
        return GatheredTensors(source=source, stages=self._tensors(gathered.stages))

    @cached_property
    def ring(self) -> tuple[tuple[StageTensors, ...], ...]:
        """The stages of `p2p`, by the rank whose shard they attend to."""
        return tuple(
            self._tensors(self._stages.from_shard(rank)) for rank in range(self.exchange.size)
        )

    def _tensors(self, stages: tuple[AttentionStage, ...]) -> tuple[StageTensors, ...]:
        if self.kept is not None:
            stages = trim_stages(stages, self.kept)
        return stage_tensors(stages, self.device)

    @cached_property
    def whole_row(self) -> AttentionPlan:
        """The plan of the whole packed row, for `a2a`."""
        return AttentionPlan.from_layout(self.shards.layout, self.device)

    @cached_property
    def row_order(self) -> tuple[Tensor, Tensor]:
        """[T] int64 each: which of all ranks' tokens each of the packed row's is, and back."""
        rows = np.concatenate(
            [RankStages(self.shards, rank).rows() for rank in range(self.exchange.size)]
        )
        layout = self.shards.layout
        rows[rows < 0] = np.arange(layout.num_tokens - layout.num_padding, layout.num_tokens)
        return tuple(copy_to_device([np.argsort(rows), rows], self.device))


@dataclass(frozen=True, kw_only=True)
class GatheredTensors:
    """`GatheredStages` on the device."""

    source: Tensor
    """[keys] int64"""
    stages: tuple[StageTensors, ...]


class _GatheredAttention(torch.autograd.Function):
    """`all_gather`. Saves q, k, v, out and lse of this rank's row."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: ContextParallelPlan,
        layer_number: int,
        compute: StageCompute,
    ) -> Tensor:
        """Attend locally while the shards come in, then to them."""
        record = plan.exchange.recorder(layer_number, "forward")
        pending = plan.exchange.gather(_shard(k, v, plan), record)
        out, lse = _attend_locally(plan, compute, q, k, v)
        shards = pending.wait()[plan.gathered.source]
        compute.merge(plan.gathered.stages, q, *shards.unbind(1), out, lse)
        return _save(ctx, q, k, v, out, lse, plan, layer_number, compute)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Gather again; the shards' gradients travel while the local ones are computed."""
        merged, k, v, plan, compute = _saved(ctx, dout)
        record = plan.exchange.recorder(ctx.layer_number, "backward")
        pending = plan.exchange.gather(_shard(k, v, plan), record)
        dq = torch.zeros_like(merged.q, dtype=merged.lse.dtype)
        gathered = pending.wait()
        source = plan.gathered.source
        shards = gathered[source]
        d_shards = torch.zeros_like(shards, dtype=merged.lse.dtype)
        compute.add_shares(plan.gathered.stages, merged, *shards.unbind(1), dq, *d_shards.unbind(1))
        shares = torch.zeros_like(gathered, dtype=merged.lse.dtype)
        shares[source] = d_shards
        pending = plan.exchange.reduce(shares, record)
        local_dq, dk, dv = _local_shares(plan, compute, merged, k, v)
        _add_to_shard(dk, dv, pending.wait().sum(dim=0))
        return _gradients(merged.q, dq + local_dq, k, dk, v, dv)


class _RingAttention(torch.autograd.Function):
    """`p2p`. Saves q, k, v, out and lse of this rank's row."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: ContextParallelPlan,
        layer_number: int,
        compute: StageCompute,
    ) -> Tensor:
        """Attend to one shard while the next one comes in."""
        exchange = plan.exchange
        record = exchange.recorder(layer_number, "forward")
        held = _shard(k, v, plan)
        out = lse = None
        for step in range(exchange.size):
            source = (exchange.rank - step) % exchange.size
            pending = None
            if step + 1 < exchange.size:
                coming = exchange.shard_tokens[(source - 1) % exchange.size]
                pending = exchange.rotate(held, coming, record)
            if step == 0:
                out, lse = _attend_locally(plan, compute, q, k, v)
            compute.merge(plan.ring[source], q, *held.unbind(1), out, lse)
            if pending is not None:
                held = pending.wait()
        return _save(ctx, q, k, v, out, lse, plan, layer_number, compute)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Shards go round again, each followed by its gradient, which ends on its own rank."""
        merged, k, v, plan, compute = _saved(ctx, dout)
        exchange, wide = plan.exchange, merged.lse.dtype
        record = exchange.recorder(ctx.layer_number, "backward")
        held = _shard(k, v, plan)
        travelling = None  # the gradient of the shard that the last step attended to
        for step in range(exchange.size):
            source = (exchange.rank - step) % exchange.size
            pending = None
            if step + 1 < exchange.size:
                coming = exchange.shard_tokens[(source - 1) % exchange.size]
                pending = exchange.rotate(held, coming, record)
            if step == 0:
                dq, dk, dv = _local_shares(plan, compute, merged, k, v)
                n = plan.shard_tokens
                own = (*held.unbind(1), dq, dk[:n], dv[:n])
                compute.add_shares(plan.ring[source], merged, *own)
            else:
                d_held = torch.zeros_like(held, dtype=wide)
                compute.add_shares(
                    plan.ring[source], merged, *held.unbind(1), dq, *d_held.unbind(1)
                )
                if travelling is not None:
                    d_held += travelling.wait()
                coming = exchange.shard_tokens[(source - 1) % exchange.size]
                travelling = exchange.rotate(d_held, coming, record)
            if pending is not None:
                held = pending.wait()
        if travelling is not None:
            _add_to_shard(dk, dv, travelling.wait())
        return _gradients(merged.q, dq, k, dk, v, dv)


class _RowOfSomeHeads(torch.autograd.Function):
    """This rank's row of all heads -> the packed row of this rank's heads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: ContextParallelPlan, layer_number: int) -> Tensor:
        """x [C, ranks, heads, D] -> [T, heads, D]."""
        ctx.plan, ctx.layer_number = plan, layer_number
        return _to_packed_row(x, plan, plan.exchange.recorder(layer_number, "forward"))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        """dx [T, heads, D] -> [C, ranks, heads, D]."""
        record = ctx.plan.exchange.recorder(ctx.layer_number, "backward")
        return _from_packed_row(dx, ctx.plan, record), None, None


class _AllHeadsOfSomeRows(torch.autograd.Function):
    """The packed row of this rank's heads -> this rank's row of all heads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: ContextParallelPlan, layer_number: int) -> Tensor:
        """x [T, heads, D] -> [C, ranks, heads, D]."""
        ctx.plan, ctx.layer_number = plan, layer_number
        return _from_packed_row(x, plan, plan.exchange.recorder(layer_number, "forward"))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        """dx [C, ranks, heads, D] -> [T, heads, D]."""
        record = ctx.plan.exchange.recorder(ctx.layer_number, "backward")
        return _to_packed_row(dx, ctx.plan, record), None, None


def _to_packed_row(x: Tensor, plan: ContextParallelPlan, record: Recorder) -> Tensor:
    parts = plan.exchange.swap(x.transpose(0, 1).contiguous(), record)
    return parts.flatten(0, 1)[plan.row_order[0]]


def _from_packed_row(x: Tensor, plan: ContextParallelPlan, record: Recorder) -> Tensor:
    parts = x[plan.row_order[1]].unflatten(0, (plan.exchange.size, -1))
    return plan.exchange.swap(parts, record).transpose(0, 1)


def _shard(k: Tensor, v: Tensor, plan: ContextParallelPlan) -> Tensor:
    """[n, 2, Hk, D] contiguous, of its own memory."""
    n = plan.shard_tokens
    return torch.stack((k[:n], v[:n]), dim=1)


def _attend_locally(
    plan: ContextParallelPlan, compute: StageCompute, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    self_stage, *cross_stages = plan.local
    out, lse = compute.first(self_stage, q, k, v, wide=True)
    compute.merge(cross_stages, q, k, v, out, lse)
    return out, lse


def _local_shares(
    plan: ContextParallelPlan, compute: StageCompute, merged: MergedAttention, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    self_stage, *cross_stages = plan.local
    dq, dk, dv = compute.first_shares(self_stage, merged, k, v, wide=True)
    compute.add_shares(cross_stages, merged, k, v, dq, dk, dv)
    return dq, dk, dv


def _add_to_shard(dk: Tensor, dv: Tensor, d_shard: Tensor) -> None:
    """Add the gradient [n, 2, Hk, D] of the shard to the rank's."""
    n = d_shard.shape[0]
    dk[:n] += d_shard[:, 0]
    dv[:n] += d_shard[:, 1]


def _save(
    ctx: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: ContextParallelPlan,
    layer_number: int,
    compute: StageCompute,
) -> Tensor:
    out = out.to(q.dtype)
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.plan, ctx.layer_number, ctx.compute = plan, layer_number, compute
    return out


def _saved(
    ctx: Any, dout: Tensor
) -> tuple[MergedAttention, Tensor, Tensor, ContextParallelPlan, StageCompute]:
    q, k, v, out, lse = ctx.saved_tensors
    merged = MergedAttention(q=q, out=out, lse=lse, dout=dout.contiguous())
    return merged, k, v, ctx.plan, ctx.compute


def _gradients(
    q: Tensor, dq: Tensor, k: Tensor, dk: Tensor, v: Tensor, dv: Tensor
) -> tuple[Tensor | None, ...]:
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None
