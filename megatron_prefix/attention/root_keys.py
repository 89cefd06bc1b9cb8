"""Keys and values of a prompt that several rows attend to, and the gradient that they give back.

A group that is too large for one row runs as a series: a row with its root (the prompt) alone,
then rows with its responses. The root's row keeps each layer's keys and values; the later rows
attend to them by one more stage, merged by log-sum-exp as any other, and add up their gradients
here. Backward of the root's row comes last and takes these gradients as what flows into its keys
and values from later rows. So the root runs once, forward and backward, and the sum of all
gradients is the same as if it were in one row with all responses. Recurrent layers keep states,
see `root_states.py`.

Shapes: R tokens of the root, Hk key/value heads, D head dimension, Dv that of values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_prefix.attention.kernels import MergedAttention
from megatron_prefix.attention.root_states import RootStates
from megatron_prefix.attention.stage_compute import StageCompute
from megatron_prefix.layout import AttentionStage


@dataclass(kw_only=True)
class LayerRootKeys:
    """The root's keys and values in one layer."""

    keys: Tensor
    """[R, Hk, D]"""
    values: Tensor
    """[R, Hk, Dv]"""
    d_keys: Tensor | None = None
    """[R, Hk, D] what later rows have added up so far, in float32 or wider; None: nothing yet."""
    d_values: Tensor | None = None

    def gradients(self, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """The sums to add to."""
        if self.d_keys is None or self.d_values is None:
            self.d_keys = torch.zeros_like(self.keys, dtype=wide)
            self.d_values = torch.zeros_like(self.values, dtype=wide)
        return self.d_keys, self.d_values


class RootKeys:
    """The root's keys and values, or states, in all layers of this rank, while its series runs."""

    def __init__(self, num_tokens: int) -> None:
        """Nothing is kept yet.

        Args:
            num_tokens: R.
        """
        self.num_tokens = num_tokens
        self.recurrent = RootStates()
        """Of recurrent layers."""
        self._layers: dict[int, LayerRootKeys] = {}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The time of one pass through the series; afterwards nothing is kept, come what may."""
        assert not self.layers, "this series runs already"
        try:
            yield
        finally:
            self._layers.clear()
            self.recurrent.clear()

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers of which something is kept."""
        return tuple(sorted({*self._layers, *self.recurrent.inputs}))

    def of_layer(self, number: int) -> LayerRootKeys:
        """What was kept of a layer, counted from 1."""
        return self._layers[number]

    def keep(self, number: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's keys and values of the root's row, whose first R tokens are the root.

        Args:
            number: of the layer.
            k, v: [T, Hk, D] and [T, Hk, Dv] of the row.

        Returns:
            k and v; what flows back into them includes the gradient of later rows.
        """
        return _Keep.apply(k, v, self, number)

    def store(self, number: int, k: Tensor, v: Tensor) -> None:
        """Copy a layer's keys and values. Gradients that have been added up stay, since activation
        recompute runs the root's forward once more before its backward."""
        # Copies: a view would hold the whole projection.
        keys, values = (x[: self.num_tokens].clone() for x in (k, v))
        layer = self._layers.get(number)
        if layer is None:
            self._layers[number] = LayerRootKeys(keys=keys, values=values)
        else:
            layer.keys, layer.values = keys, values


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, root: RootKeys, number: int
    ) -> tuple[Tensor, Tensor]:
        """k and v, which are noted."""
        ctx.root, ctx.number = root, number
        root.store(number, k, v)
        return k.view_as(k), v.view_as(v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        """Add what later rows have given back."""
        layer = ctx.root.of_layer(ctx.number)
        sums = (layer.d_keys, layer.d_values)
        return (*(_added(dx, later) for dx, later in zip((dk, dv), sums, strict=True)), None, None)


def _added(dx: Tensor, later: Tensor | None) -> Tensor:
    if later is None:
        return dx
    total = dx.to(later.dtype, copy=True)
    total[: len(later)] += later
    return total.to(dx.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class RootHalo:
    """The `Halo` of a row in a layer with a sliding window: the root's last rows."""

    keys: LayerRootKeys
    num_rows: int

    def extend(self, k: Tensor, v: Tensor, *, in_backward: bool) -> tuple[Tensor, Tensor]:
        """See `Halo.extend`."""
        ends = (x[-self.num_rows :] for x in (self.keys.keys, self.keys.values))
        return tuple(torch.cat(parts) for parts in zip((k, v), ends, strict=True))

    def give_back(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """See `Halo.give_back`."""
        sums = self.keys.gradients(gradients[0].dtype)
        for total, x in zip(sums, gradients, strict=True):
            total[-self.num_rows :] += x[-self.num_rows :]
        return [x[: -self.num_rows] for x in gradients]


@dataclass(frozen=True, kw_only=True, eq=False)
class RootStage:
    """The attention of a row to a layer's root keys."""

    stage: AttentionStage[Tensor]
    keys: LayerRootKeys

    def merge(self, compute: StageCompute, q: Tensor, out: Tensor, lse: Tensor) -> None:
        """Merge it into out and lse, in place."""
        compute.merge([self.stage], q, self.keys.keys, self.keys.values, out, lse)

    def add_shares(self, compute: StageCompute, merged: MergedAttention, dq: Tensor) -> None:
        """Add its share to dq, and to what is given back to the root."""
        sums = self.keys.gradients(merged.lse.dtype)
        compute.add_shares([self.stage], merged, self.keys.keys, self.keys.values, dq, *sums)
