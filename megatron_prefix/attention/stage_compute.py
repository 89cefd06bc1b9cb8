"""Stages through a kernel, and what autograd keeps of them.

A token's keys lie in several stages. Each returns its out and lse over its own keys, which
`merge.py` merges. Backward needs no such merge: a stage's backward with the merged out and lse
yields that stage's share of dq, dk and dv, and the shares add up (see `Kernel.backward`).

Shapes: T tokens of the row, N of them attend (all, but for a trimmed last layer), H query heads, Hk
key/value heads, D head dimension, Dv that of values. Where a kernel takes no Dv below D, values and
what else has their size are filled up with zeros for the call alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_prefix.attention.kernels import CallOptions, Kernel, MergedAttention
from megatron_prefix.attention.merge import merge_
from megatron_prefix.attention.sinks import merge_sink, sink_gradient
from megatron_prefix.layout import AttentionStage
from megatron_prefix.layout.stages import Copies


@dataclass(frozen=True)
class StageCompute:
    """Stages through one kernel: forward merged, backward added up.

    Every stage is called with the keys that it attends to: those of the row, or of any other buffer
    (shards of other ranks), whose gradients are then added up beside the row's.

    What is merged or added into is `wide`, in the lse's dtype, where a row may take part in more
    than two stages. A single merge or addition is computed in float32 whatever the dtypes, so what
    it goes into may be in the kernel's own dtype: it is rounded once either way.
    """

    kernel: Kernel
    scale: float
    deterministic: bool = False

    def attend(
        self,
        stages: Sequence[AttentionStage[Tensor]],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        wide: bool,
    ) -> tuple[Tensor, Tensor]:
        """out [N, H, Dv] and lse [N, H] of stages of which the first has all queries."""
        out, lse = self._first(stages[0], q, k, v, wide=wide)
        self.merge(stages[1:], q, k, v, out, lse)
        return out, lse

    def shares(
        self,
        stages: Sequence[AttentionStage[Tensor]],
        merged: MergedAttention,
        k: Tensor,
        v: Tensor,
        *,
        wide: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv of such stages, to be added to."""
        dq, dk, dv = self._first_shares(stages[0], merged, k, v, wide=wide)
        self.add_shares(stages[1:], merged, k, v, dq, dk, dv)
        return dq, dk, dv

    def _first(
        self, stage: AttentionStage[Tensor], q: Tensor, k: Tensor, v: Tensor, *, wide: bool
    ) -> tuple[Tensor, Tensor]:
        """out [N, H, Dv] and lse [N, H] of a stage of all queries."""
        out, lse = self._forward(stage, q, k, v)
        return (out.to(lse.dtype) if wide else out), lse

    def merge(
        self,
        stages: Iterable[AttentionStage[Tensor]],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Merge stages against the keys k, v into out and lse, in place."""
        for stage in stages:
            stage_out, stage_lse = self._forward(stage, q, k, v)
            if isinstance(stage.queries, Tensor):
                merge_(out, lse, stage_out, stage_lse, rows=stage.queries)
            else:
                merge_(out[stage.queries], lse[stage.queries], stage_out, stage_lse)

    def _first_shares(
        self,
        stage: AttentionStage[Tensor],
        merged: MergedAttention,
        k: Tensor,
        v: Tensor,
        *,
        wide: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of a stage of all queries, to be added to."""
        dq, *d_keys = self._backward(stage, merged, k, v)
        if wide:
            dq, *d_keys = (share.to(merged.lse.dtype) for share in (dq, *d_keys))
        if stage.copies is not None:
            d_keys = [sum_of_copies(x.to(merged.lse.dtype), stage.copies) for x in d_keys]
        elif d_keys[0].shape[0] < k.shape[0]:
            shares = d_keys
            d_keys = [x.new_zeros(x.shape, dtype=shares[0].dtype) for x in (k, v)]
            for all_keys, share in zip(d_keys, shares, strict=True):
                all_keys[stage.keys] = share
        return dq, *d_keys

    def add_shares(
        self,
        stages: Iterable[AttentionStage[Tensor]],
        merged: MergedAttention,
        k: Tensor,
        v: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """Add the stages' shares against the keys k, v to dq, and to dk and dv of these keys."""
        for stage in stages:
            dq_share, dk_share, dv_share = self._backward(stage, merged, k, v)
            dq[stage.queries] += dq_share
            dk[stage.keys] += dk_share
            dv[stage.keys] += dv_share

    def _forward(
        self, stage: AttentionStage[Tensor], q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        queries, keys, values = q[stage.queries], k[stage.keys], v[stage.keys]
        missing, size = self._missing(k, v), v.shape[2]
        if not missing:
            return self.kernel.forward(queries, keys, values, stage.on, self._options)
        values = F.pad(values, (0, missing))
        out, lse = self.kernel.forward(queries, keys, values, stage.on, self._options)
        return out[..., :size].contiguous(), lse

    def _backward(
        self, stage: AttentionStage[Tensor], merged: MergedAttention, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        keys, values, of_queries = k[stage.keys], v[stage.keys], merged[stage.queries]
        missing, size = self._missing(k, v), v.shape[2]
        if not missing:
            return self.kernel.backward(of_queries, keys, values, stage.on, self._options)
        of_queries = dataclasses.replace(
            of_queries,
            dout=F.pad(of_queries.dout, (0, missing)),
            out=F.pad(of_queries.out, (0, missing)),
        )
        values = F.pad(values, (0, missing))
        dq, dk, dv = self.kernel.backward(of_queries, keys, values, stage.on, self._options)
        return dq, dk, dv[..., :size]

    def _missing(self, k: Tensor, v: Tensor) -> int:
        """Zeros that the kernel needs behind each value."""
        return 0 if self.kernel.value_sizes else k.shape[2] - v.shape[2]

    @property
    def _options(self) -> CallOptions:
        return CallOptions(scale=self.scale, deterministic=self.deterministic)


def sum_of_copies(values: Tensor, copies: Copies[Tensor]) -> Tensor:
    """[copies, ...] -> [rows, ...] the sum over the copies of each row, 0 where it has none.

    Every row adds up in the order of its copies: the same bits every time, on every device.
    """
    return torch.segment_reduce(
        values[copies.order], "sum", offsets=copies.bounds, axis=0, initial=0, unsafe=True
    )


def save_for_backward(
    ctx: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sink: Tensor | None,
    *others: Tensor,
) -> Tensor:
    """Merge the sink, keep what every backward reads, and return out in q's dtype.

    `others` are kept as the last saved tensors.
    """
    if sink is not None:
        out, lse = merge_sink(out, lse, sink)
    out = out.to(q.dtype)
    ctx.save_for_backward(q, k, v, out, lse, sink, *others)
    return out


def saved_for_backward(
    ctx: Any, dout: Tensor
) -> tuple[MergedAttention, Tensor, Tensor, Tensor | None]:
    """What was kept, k and v, and the gradient of the sink from this rank's queries."""
    q, k, v, out, lse, sink, *_ = ctx.saved_tensors
    merged = MergedAttention(dout=dout.contiguous(), q=q, out=out, lse=lse)
    return merged, k, v, None if sink is None else sink_gradient(merged, sink)


def gradients_like(
    gradients: tuple[Tensor, Tensor, Tensor], inputs: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """dq, dk and dv in the dtypes of q, k and v."""
    return tuple(dx.to(x.dtype) for dx, x in zip(gradients, inputs, strict=True))
