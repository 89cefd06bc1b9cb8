"""The gated delta rule (arXiv 2412.06464) over a packed row with shared prefixes.

For each token, with a state S [K, V] of a head that runs along its path:

    S = exp(g) S;    S = S + beta k (v - k^T S)^T;    out = S^T q / sqrt(K)

What computes it is chosen, see `delta_rules`. Branches of the tree begin with the same state, whose
gradient adds up theirs. Only the rows are kept for backward, and the states that runs begin with
where other ranks or an earlier row have made them; all other states are computed again there.

Shapes: T tokens, H heads, K and V the sizes of keys and values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from megatron_prefix.attention.context_parallel.states import RankStates
from megatron_prefix.attention.delta_rules import Chunks, DeltaRule, TorchRule
from megatron_prefix.layout import Recurrence

_TORCH = TorchRule()


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    row: Recurrence[Tensor],
    states: RankStates | None = None,
    begin: Tensor | None = None,
    rule: DeltaRule = _TORCH,
) -> Tensor:
    """The outputs of a row's tokens. With `states` collective, backward too.

    Args:
        q, k: [T, H, K], normalised as the layer does; v: [T, H, V].
        g: [T, H] logarithms of the decay, at most 0, in float32 or wider.
        beta: [T, H] how much of a key's value is written, in [0, 1].
        row: the row's paths, or those of this rank's part of it.
        states: of the row's sharded segments; None: it has none.
        begin: [H, K, V] the state behind a root that an earlier row has run; None: it has its own.
        rule: what computes it, from `select_delta_rule`.

    Returns:
        [T, H, V] in v's dtype; 0 on padding.
    """
    return _DeltaRule.apply(q, k, v, g, beta, begin, row, states, rule, False)[0]


def rule_and_last_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    row: Recurrence[Tensor],
    rule: DeltaRule = _TORCH,
) -> tuple[Tensor, Tensor]:
    """The outputs of a row of one segment, and the state behind it; both have gradients.

    Args:
        q, k, v, g, beta, row, rule: see `gated_delta_rule`.

    Returns:
        The outputs, and the state [H, K, V] in float32 or wider.
    """
    return _DeltaRule.apply(q, k, v, g, beta, None, row, None, rule, True)


def rule_and_states(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    row: Recurrence[Tensor],
    *,
    behind: np.ndarray,
) -> tuple[Tensor, Tensor]:
    """The outputs of a whole row's tokens, and states from which its paths can go on.

    Args:
        q, k, v, g, beta, row: see `gated_delta_rule`.
        behind: [N] numbers of chunks.

    Returns:
        The outputs, and the states [N, H, K, V] behind those chunks, in float32 or wider.
    """
    states = dict.fromkeys(behind.tolist())
    out, *_ = Chunks.of(q, k, v, g, beta, row).read(row, None, states)
    return out.to(v.dtype), torch.stack([states[chunk] for chunk in behind.tolist()])


def delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> Tensor:
    """The outputs [n, H, V] of one more token of each of n sequences, in v's dtype.

    Args:
        q, k, v, g, beta: see `gated_delta_rule`, with n for T.
        state: [n, H, K, V] before the tokens; becomes the state behind them.
    """
    wide = state.dtype
    q, k, values, g, beta = (x.to(wide) for x in (q, k, v, g, beta))
    state.mul_(g.exp()[..., None, None])
    known = (k[..., None, :] @ state)[..., 0, :]
    change = beta[..., None] * (values - known)
    state.flatten(0, 1).baddbmm_(k.flatten(0, 1)[:, :, None], change.flatten(0, 1)[:, None])
    return ((q[..., None, :] @ state)[..., 0, :] * q.shape[-1] ** -0.5).to(v.dtype)


class _DeltaRule(torch.autograd.Function):
    """Saves the rows, and the states that runs begin with where they come from elsewhere."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        begin: Tensor | None,
        row: Recurrence[Tensor],
        states: RankStates | None,
        rule: DeltaRule,
        asks_for_last: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the maps of this rank's pieces, gather all, and go on from the states."""
        computed, begins = rule.of(q, k, v, g, beta, row), begin
        if begin is not None:
            begins = begin[None]
        elif states is not None:
            begins = states.before_runs(computed.maps(row, added=True))
        ctx.save_for_backward(q, k, v, g, beta, begins)
        ctx.row, ctx.states, ctx.rule, ctx.asks_for_last = row, states, rule, asks_for_last
        out, _, last = computed.read(row, begins)
        return out.to(v.dtype), last.clone() if asks_for_last else None

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
            return *of_inputs, d_begins[0], None, None, None, None
        found = torch.autograd.grad(outputs, inputs, gradients, materialize_grads=True)
        return *found, None, None, None, None, None


def causal_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row: Recurrence[Tensor],
    behind: Tensor | None = None,
) -> Tensor:
    """[T, d] of each channel, the sum of a token's last inputs along its path, weighted.

    Only x is kept for backward.

    Args:
        x: [T, d] inputs, and behind them those of other ranks, see `Recurrence.halo`.
        weight: [d, width], that of the token's own input last.
        bias: [d]
        behind: [n, d] the last inputs of a root that an earlier row has run; None: it has its own.
    """
    return checkpoint(
        _convolution, x, weight, bias, row, behind, use_reentrant=False, preserve_rng_state=False
    )


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row: Recurrence[Tensor],
    behind: Tensor | None,
) -> Tensor:
    parts = (x,) if behind is None else (x, behind)
    with_zeros = torch.cat((*parts, x.new_zeros(1, x.shape[1])))
    out = sum(with_zeros[row.inputs[:, i]] * weight[:, i] for i in range(weight.shape[1]))
    return out if bias is None else out + bias
