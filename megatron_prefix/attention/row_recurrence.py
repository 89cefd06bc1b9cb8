"""A row as recurrent layers read it: its paths, and where it is distributed, the other ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from megatron_prefix.attention.context_parallel.halo import with_halo
from megatron_prefix.attention.context_parallel.layer import LayerExchange
from megatron_prefix.attention.context_parallel.states import RankStates
from megatron_prefix.attention.convolution import causal_convolution
from megatron_prefix.attention.delta_rules import DeltaRule, TorchRule
from megatron_prefix.attention.exchange import Exchange
from megatron_prefix.attention.recurrent_rule import Rule, apply_rule, apply_rule_to_root
from megatron_prefix.attention.root_keys import RootKeys
from megatron_prefix.attention.root_states import keep
from megatron_prefix.layout import Recurrence
from megatron_prefix.layout.rows import WholeRow


class LayerPaths(Protocol):
    """The paths that a layer's tokens are on: in a packed row, or of sequences being sampled."""

    whole_row: WholeRow[Tensor] | None
    """How heads are exchanged; None: they are not."""
    exchange: LayerExchange | None
    """With other ranks; None: the row is here."""
    delta_rule: DeltaRule
    """What computes the delta rule."""

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[T, d] see `causal_convolution`, of [T, d] inputs."""
        ...

    def apply(self, rule: Rule, *inputs: Tensor) -> Tensor:
        """[T, H, V] the outputs of a rule, see `apply_rule`."""
        ...


class RowPaths(Protocol):
    """The same for every recurrent layer."""

    def of_layer(self, number: int, *, by_heads: bool) -> LayerPaths:
        """See `RowRecurrence.of_layer`."""
        ...


def layer_paths(rows: RowPaths | None, number: int, *, by_heads: bool) -> LayerPaths:
    """The paths of one recurrent layer.

    Args:
        rows: of the batch.
        number, by_heads: see `RowRecurrence.of_layer`.

    Raises:
        ValueError: the row was not planned for recurrent layers, or not for this one.
    """
    if rows is None:
        raise ValueError(
            f"layer {number} is recurrent, but the row was not planned for that: give the batch's "
            "AttentionSetup the model's recurrence_width, as AttentionSetup.of does"
        )
    return rows.of_layer(number, by_heads=by_heads)


@dataclass(frozen=True, kw_only=True, eq=False)
class RowRecurrence:
    """The paths of a packed row, or of this rank's part of it, for every recurrent layer."""

    own: Recurrence[Tensor] | None
    """Of the rank's tokens; None: every layer exchanges heads."""
    whole_row: WholeRow[Tensor] | None = None
    """For layers that exchange heads; None: there are none."""
    exchange: Exchange | None = None
    """With the ranks that the row is distributed over; None: all of it is here."""
    root: RootKeys | None = None
    keeps_root: bool = False
    """See `RowAttention`; so is `root`."""
    delta_rule: DeltaRule = field(default_factory=TorchRule)
    """What computes the delta rule."""

    def of_layer(self, number: int, *, by_heads: bool) -> LayerPaths:
        """What a layer needs of it.

        Args:
            number: of the layer in the whole model, from 1.
            by_heads: whether it exchanges heads, where the row is distributed.

        Raises:
            ValueError: the row was not planned for that.
        """
        layer = whole_row = None
        row = self.own
        if self.exchange is not None:
            layer = LayerExchange(number=number, exchange=self.exchange)
            if by_heads:
                whole_row = self.whole_row
                row = None if whole_row is None else whole_row.recurrence
        if row is None:
            raise ValueError(
                f"layer {number}: the row was planned for layers with another cp_comm_type; give "
                "the batch's AttentionSetup the comm_types of all layers"
            )
        if self.root is not None:
            assert layer is None, "no series of rows with context parallelism"
            of_series = RootRecurrence if self.keeps_root else LaterRecurrence
            return of_series(row=row, number=number, root=self.root, delta_rule=self.delta_rule)
        return LayerRecurrence(
            row=row, whole_row=whole_row, exchange=layer, delta_rule=self.delta_rule
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerRecurrence:
    """The paths that one layer follows, and what it exchanges with other ranks."""

    row: Recurrence[Tensor]
    """Of the rank's tokens or, where heads are exchanged, of the whole row."""
    whole_row: WholeRow[Tensor] | None
    """How heads are exchanged; None: they are not."""
    exchange: LayerExchange | None
    """None: the row is here."""
    delta_rule: DeltaRule
    """See `RowRecurrence`."""

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `LayerPaths`. Collective where other ranks' inputs are needed."""
        if self.row.halo is not None:
            x = with_halo(x, self.row.halo, self.exchange)
        return causal_convolution(x, weight, bias, self.row)

    def apply(self, rule: Rule, *inputs: Tensor) -> Tensor:
        """See `LayerPaths`. Collective where segments are sharded."""
        return apply_rule(rule, inputs, self.row, states=self.states)

    @property
    def states(self) -> RankStates | None:
        """Of sharded segments; None: the state of every token is found here."""
        if self.exchange is None or self.row.states is None:
            return None
        return RankStates(plan=self.row.states, layer=self.exchange)


@dataclass(frozen=True, kw_only=True, eq=False)
class _RecurrenceInSeries:
    """`LayerPaths` of a row of a series, which is whole on its rank."""

    row: Recurrence[Tensor]
    number: int
    """Of the layer."""
    root: RootKeys
    delta_rule: DeltaRule
    """See `RowRecurrence`."""
    whole_row: None = None
    exchange: None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class RootRecurrence(_RecurrenceInSeries):
    """Of the first row, the root alone: what later rows go on from is kept."""

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `LayerPaths`."""
        end = self.root.num_tokens
        last = x[max(0, end + 1 - self.row.inputs.shape[1]) : end]
        x = keep(self.root.recurrent.inputs, self.number, last, along=x)
        return causal_convolution(x, weight, bias, self.row)

    def apply(self, rule: Rule, *inputs: Tensor) -> Tensor:
        """See `LayerPaths`."""
        out, state = apply_rule_to_root(rule, inputs, self.row)
        return keep(self.root.recurrent.states, self.number, state, along=out)


@dataclass(frozen=True, kw_only=True, eq=False)
class LaterRecurrence(_RecurrenceInSeries):
    """Of a row with responses, which goes on from what was kept."""

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `LayerPaths`."""
        behind = self.root.recurrent.inputs[self.number].leaf()
        return causal_convolution(x, weight, bias, self.row, behind)

    def apply(self, rule: Rule, *inputs: Tensor) -> Tensor:
        """See `LayerPaths`."""
        begin = self.root.recurrent.states[self.number].leaf()
        return apply_rule(rule, inputs, self.row, begin=begin)
