"""What recurrent layers compute of a row, whatever the rule by which their state goes on.

Branches of the tree begin with the same state, whose gradient adds up theirs. Only the inputs' rows
are kept for backward, and the states that runs begin with where other ranks or an earlier row have
made them; all other states are computed again there.

Shapes: T tokens, H heads, K and V the sizes of keys and values. A state is [H, K, V], in float32 or
wider. A piece is a part of a sharded segment, see `layout.shared_states`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_prefix.attention.context_parallel.states import RankStates
from megatron_prefix.layout import Recurrence

VALUES = 2
"""Place of the values [T, H, V] among a rule's inputs."""


class ComputedRule(Protocol):
    """A row's inputs, ready to be read from states. Autograd goes through it."""

    def read(self, row: Recurrence[Tensor], begins: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[T, H, V] what tokens read, 0 on padding; [pieces, H, K, V] the states behind the row's
        pieces; and [H, K, V] that behind the last token, of a row of one segment.

        Args:
            begins: [begins, H, K, V] states that runs of the row begin with; None: all begin with
                none.
        """
        ...

    def maps(self, row: Recurrence[Tensor], *, added: bool) -> Tensor:
        """[pieces, H, K, F + V] what each of the row's pieces makes of the state before it: the
        factor, and with `added` behind it the state that is added; else [pieces, H, K, F]. F is K,
        or 1 where the factor is a number for each key channel. Without gradients."""
        ...


class Rule(Protocol):
    """How a state goes on along a path, and what tokens read from it."""

    def of(self, *inputs: Any) -> ComputedRule:
        """The rule of a row.

        Args:
            inputs: [T, ...] tensors, the values third; and behind them the row's `Recurrence`.
        """
        ...


class SteppedRule(Rule, Protocol):
    """A rule that single tokens can be added by."""

    def step(self, *inputs: Tensor) -> Tensor:
        """The outputs [n, H, V] of one more token of each of n sequences, in the values' dtype.

        Args:
            inputs: those of `of`, with n for T; and behind them the states [n, H, K, V] before the
                tokens, which become the states behind them.
        """
        ...


def apply_rule(
    rule: Rule,
    inputs: tuple[Tensor, ...],
    row: Recurrence[Tensor],
    *,
    states: RankStates | None = None,
    begin: Tensor | None = None,
) -> Tensor:
    """[T, H, V] the outputs of a row's tokens in the values' dtype; 0 on padding. With `states`
    collective, backward too.

    Args:
        rule: what computes them.
        inputs: of the rule.
        row: the row's paths, or those of this rank's part of it.
        states: of the row's sharded segments; None: it has none.
        begin: [H, K, V] the state behind a root that an earlier row has run; None: it has its own.
    """
    return _Rule.apply(rule, begin, row, states, False, *inputs)[0]


def apply_rule_to_root(
    rule: Rule, inputs: tuple[Tensor, ...], row: Recurrence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The outputs of a row of one segment, and the state [H, K, V] behind it; both have gradients.

    Args:
        rule, inputs, row: see `apply_rule`.
    """
    return _Rule.apply(rule, None, row, None, True, *inputs)


class _Rule(torch.autograd.Function):
    """Saves the rows, and the states that runs begin with where they come from elsewhere."""

    @staticmethod
    def forward(
        ctx: Any,
        rule: Rule,
        begin: Tensor | None,
        row: Recurrence[Tensor],
        states: RankStates | None,
        asks_for_last: bool,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the maps of this rank's pieces, gather all, and go on from the states."""
        computed, begins = rule.of(*inputs, row), begin
        if begin is not None:
            begins = begin[None]
        elif states is not None:
            maps = computed.maps(row, added=True)
            begins = states.before_runs(maps, value_size=inputs[VALUES].shape[-1])
        ctx.save_for_backward(*inputs, begins)
        ctx.row, ctx.states, ctx.rule, ctx.asks_for_last = row, states, rule, asks_for_last
        out, _, last = computed.read(row, begins)
        return out.to(inputs[VALUES].dtype), last.clone() if asks_for_last else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the states again. What the gradient of a piece's last state is, ranks find as
        they found the states: from what each run gives to the state that it began with."""
        *inputs, begins = ctx.saved_tensors
        row, states = ctx.row, ctx.states
        inputs = [x.detach().requires_grad_() for x in inputs]
        if begins is not None:
            begins = begins.detach().requires_grad_()
        with torch.enable_grad():
            computed = ctx.rule.of(*inputs, row)
            out, ends, last = computed.read(row, begins)
        outputs, gradients = [out], [dout.to(out.dtype)]
        if ctx.asks_for_last:
            outputs.append(last)
            gradients.append(d_last)
        if states is not None:
            (d_begins,) = torch.autograd.grad(
                out, begins, gradients, retain_graph=True, materialize_grads=True
            )
            factors = computed.maps(row, added=False)
            outputs.append(ends)
            gradients.append(states.gradients_of_ends(factors, d_begins))
        elif begins is not None:
            *of_inputs, d_begins = torch.autograd.grad(outputs, [*inputs, begins], gradients)
            return None, d_begins[0], None, None, None, *of_inputs
        found = torch.autograd.grad(outputs, inputs, gradients, materialize_grads=True)
        return None, None, None, None, None, *found
