"""The gated delta rule in torch, exact in float64: chunks of a row, wave after wave.

A chunk's tokens are computed together from the state before it, and waves of chunks one after the
other (see `layout.recurrence`).

Shapes: T tokens, H heads, K and V the sizes of keys and values; C chunks of c tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_prefix.attention.delta_rules.base import RuleInputs
from megatron_prefix.layout import Recurrence


class TorchRule:
    """`DeltaRule` for any device and dtype."""

    name = "torch"

    def unsupported(self, inputs: RuleInputs) -> str | None:
        """See `DeltaRule.unsupported`."""
        return None

    def of(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, row: Recurrence[Tensor]
    ) -> Chunks:
        """See `DeltaRule.of`."""
        return Chunks.of(q, k, v, g, beta, row)


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunks:
    """`ComputedRule` by chunks: what each makes of the state S before it, in float32 or wider.

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
    ) -> Chunks:
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ComputedRule.read`.

        Args:
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
        return out * row.real[:, None, None], torch.cat(ends[::-1]), state[-1]

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
