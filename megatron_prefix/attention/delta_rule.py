"""The gated delta rule (arXiv 2412.06464) over a packed row with shared prefixes, in torch.

For each token, with a state S [K, V] of a head that runs along its path:

    S = exp(g) S;    S = S + beta k (v - k^T S)^T;    out = S^T q / sqrt(K)

A chunk's tokens are computed together from the state before it, and waves of chunks one after the
other (see `layout.recurrence`). Branches of the tree begin with the same state, whose gradient adds
up theirs. Only the rows are kept for backward, and the states that runs begin with where other
ranks or an earlier row have made them; chunks and the states between them are computed again there.

Shapes: T tokens, H heads, K and V the sizes of keys and values; C chunks of c tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from megatron_prefix.attention.context_parallel.states import RankStates
from megatron_prefix.layout import Recurrence


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    row: Recurrence[Tensor],
    states: RankStates | None = None,
    begin: Tensor | None = None,
) -> Tensor:
    """The outputs of a row's tokens. With `states` collective, backward too.

    Args:
        q, k: [T, H, K], normalised as the layer does; v: [T, H, V].
        g: [T, H] logarithms of the decay, at most 0, in float32 or wider.
        beta: [T, H] how much of a key's value is written, in [0, 1].
        row: the row's paths, or those of this rank's part of it.
        states: of the row's sharded segments; None: it has none.
        begin: [H, K, V] the state behind a root that an earlier row has run; None: it has its own.

    Returns:
        [T, H, V] in v's dtype; 0 on padding.
    """
    return _DeltaRule.apply(q, k, v, g, beta, begin, row, states, False)[0]


def rule_and_last_state(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, row: Recurrence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The outputs of a row of one segment, and the state behind it; both have gradients.

    Args:
        q, k, v, g, beta, row: see `gated_delta_rule`.

    Returns:
        The outputs, and the state [H, K, V] in float32 or wider.
    """
    return _DeltaRule.apply(q, k, v, g, beta, None, row, None, True)


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
    out, _ = _Chunks.of(q, k, v, g, beta, row).read(row, None, states)
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
        asks_for_last: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the maps of this rank's pieces, gather all, and go on from the states."""
        chunks, begins = _Chunks.of(q, k, v, g, beta, row), begin
        if begin is not None:
            begins = begin[None]
        elif states is not None:
            begins = states.before_runs(chunks.maps(row, added=True))
        ctx.save_for_backward(q, k, v, g, beta, begins)
        ctx.row, ctx.states = row, states
        ctx.last = {len(row.chunks) - 1: None} if asks_for_last else {}
        last = dict(ctx.last)
        out = chunks.read(row, begins, last)[0].to(v.dtype)
        return (out, *last.values()) if asks_for_last else (out, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the chunks again. What the gradient of a piece's last state is, ranks find as
        they found the states: from what each run gives to the state that it began with."""
        *inputs, begins = ctx.saved_tensors
        row, states = ctx.row, ctx.states
        inputs = [x.detach().requires_grad_() for x in inputs]
        if begins is not None:
            begins = begins.detach().requires_grad_()
        last = dict(ctx.last)
        with torch.enable_grad():
            chunks = _Chunks.of(*inputs, row)
            out, ends = chunks.read(row, begins, last)
        outputs, gradients = [out], [dout.to(out.dtype)]
        if last:
            outputs += last.values()
            gradients.append(d_last)
        if states is not None:
            (d_begins,) = torch.autograd.grad(
                out, begins, gradients, retain_graph=True, materialize_grads=True
            )
            factors = chunks.maps(row, added=False)
            outputs.append(ends)
            gradients.append(states.gradients_of_ends(factors, d_begins))
        elif begins is not None:
            *of_inputs, d_begins = torch.autograd.grad(outputs, [*inputs, begins], gradients)
            return *of_inputs, d_begins[0], None, None, None
        return *torch.autograd.grad(outputs, inputs, gradients), None, None, None, None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chunks:
    """What a row's chunks make of the state S before them, in float32 or wider.

    A chunk's tokens write `new - reads S` behind their keys, read `scores` of that and `queries` of
    S, and leave `kept S + keys^T (new - reads S)`.
    """

    new: Tensor
    """[C, H, c, V]"""
    reads: Tensor
    """[C, H, c, K]"""
    scores: Tensor
    """[C, H, c, c]"""
    queries: Tensor
    """[C, H, c, K]"""
    keys: Tensor
    """[C, H, c, K]"""
    kept: Tensor
    """[C, H, 1, 1]"""

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, row: Recurrence[Tensor]
    ) -> _Chunks:
        """The chunks of a row; see `gated_delta_rule`."""
        wide = torch.promote_types(v.dtype, torch.float32)
        q, k, values, g, beta = (_in_chunks(x.to(wide), row.chunks) for x in (q, k, v, g, beta))
        q = q * q.shape[-1] ** -0.5
        size = g.shape[-1]
        later = torch.ones(size, size, dtype=torch.bool, device=g.device).tril(-1)
        # [C, H, c, c]: the decay from each token of a chunk to each later one. Sums of what lies
        # between the two: differences of sums from the chunk's beginning would lose digits.
        between = torch.where(later, g[..., :, None], 0).cumsum(-2)
        decay = between.masked_fill(later.mT, float("-inf")).exp()
        g = g.cumsum(-1)
        written = k * beta[..., None]
        # What a chunk's tokens write depends on what those before them in it have written.
        among = torch.eye(size, dtype=wide, device=g.device) + (written @ k.mT * decay).tril(-1)
        solved = torch.linalg.solve_triangular(
            among,
            torch.cat((values * beta[..., None], written * g.exp()[..., None]), dim=-1),
            upper=False,
            unitriangular=True,
        )
        new, reads = solved.split([values.shape[-1], k.shape[-1]], dim=-1)
        return cls(
            new=new,
            reads=reads,
            scores=q @ k.mT * decay,
            queries=q * g.exp()[..., None],
            keys=k * decay[..., -1, :, None],
            kept=g[..., -1, None, None].exp(),
        )

    def read(
        self,
        row: Recurrence[Tensor],
        begins: Tensor | None,
        kept_states: dict[int, Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[T, H, V] what tokens read, 0 on padding; and [pieces, H, K, V] the states behind the
        row's pieces.

        Args:
            begins: [begins, H, K, V] states that runs of the row begin with; None: all begin with
                none.
            kept_states: by numbers of chunks; becomes the states [H, K, V] behind these.
        """
        outs, ends, state = [], [], None
        if begins is not None and len(begins):
            state = torch.cat((begins, begins.new_zeros(1, *begins.shape[1:])))
        # Split once: backward of a slice would fill a tensor of all chunks for every wave.
        sizes = [wave.chunks.stop - wave.chunks.start for wave in row.waves]
        of_waves = (self.new, self.reads, self.scores, self.queries, self.keys, self.kept)
        parts = zip(*(x.split(sizes) for x in of_waves), strict=True)
        for wave, going_on, of_wave in zip(row.waves, _pieces_going_on(row), parts, strict=True):
            of_tokens, reads, scores, queries, keys, kept = of_wave
            if state is not None:
                state = state[wave.before]
                of_tokens = of_tokens - reads @ state
            out = scores @ of_tokens
            added = keys.mT @ of_tokens
            if state is None:
                state = added
            else:
                out = out + queries @ state
                state = state * kept + added
            outs.append(out)
            ends.append(state[going_on : wave.pieces])
            for chunk in kept_states or ():
                if wave.chunks.start <= chunk < wave.chunks.stop:
                    kept_states[chunk] = state[chunk - wave.chunks.start].clone()
        out = torch.cat(outs).transpose(1, 2).flatten(0, 1)[row.place]
        return out * row.real[:, None, None], torch.cat(ends[::-1])

    @torch.no_grad()
    def maps(self, row: Recurrence[Tensor], *, added: bool) -> Tensor:
        """[pieces, H, K, K + V] what each of the row's pieces makes of the state before it: the
        factor, and with `added` behind it the state that is added; else [pieces, H, K, K]."""
        size = self.keys.shape[-1]
        first = row.waves[0]
        state = torch.eye(size, dtype=self.keys.dtype, device=self.keys.device)
        state = state.expand(first.pieces, self.keys.shape[1], -1, -1)
        if added:
            state = F.pad(state, (0, self.new.shape[-1]))
        ends = []
        for wave, going_on in zip(row.waves, _pieces_going_on(row), strict=True):
            here = slice(wave.chunks.start, wave.chunks.start + wave.pieces)
            state = state[: wave.pieces]
            of_tokens = -(self.reads[here] @ state)
            if added:
                of_tokens = of_tokens + F.pad(self.new[here], (size, 0))
            state = state * self.kept[here] + self.keys[here].mT @ of_tokens
            ends.append(state[going_on:])
        return torch.cat(ends[::-1])


def _pieces_going_on(row: Recurrence[Tensor]) -> list[int]:
    """For each wave, how many of its pieces have chunks in the next one too.

    They are the first of its pieces: longer pieces come first. So what ends in the waves, the last
    wave first, is in the order of the pieces.
    """
    return [wave.pieces for wave in row.waves[1:]] + [0]


def _in_chunks(x: Tensor, chunks: Tensor) -> Tensor:
    """[T, H, ...] -> [C, H, c, ...], 0 where a chunk is filled up."""
    with_zeros = torch.cat((x, x.new_zeros(1, *x.shape[1:])))
    return with_zeros[chunks].transpose(1, 2)


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
