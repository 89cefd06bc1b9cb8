"""Chunks of a row whose state runs along its paths, in torch and exact in float64.

A chunk's tokens are computed together from the state before it, and waves of chunks one after the
other (see `layout.recurrence`). Rules make chunks of their inputs, see `delta_rules` and
`state_space.py`.

Shapes: T tokens, H heads, K and V the sizes of keys and values; C chunks of c tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_prefix.layout import Recurrence


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunks:
    """`ComputedRule` by chunks: what each makes of the state S before it, in float32 or wider.

    A chunk's tokens write `new - reads S` behind their keys, read `scores` of that and `queries` of
    S, and leave `kept S + keys^T (new - reads S)`.
    """

    new: Tensor
    """[C, H, c, V]"""
    reads: Tensor | None
    """[C, H, c, K]; None: what tokens write does not depend on the state."""
    scores: Tensor
    """[C, H, c, c]"""
    queries: Tensor
    """[C, H, c, K]"""
    keys: Tensor
    """[C, H, c, K]"""
    kept: Tensor
    """[C, H, 1, 1]"""

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
        of_waves = (self.new, self.scores, self.queries, self.keys, self.kept)
        parts = zip(*(x.split(sizes) for x in of_waves), strict=True)
        reads = [None] * len(sizes) if self.reads is None else self.reads.split(sizes)
        of_row = zip(row.waves, _pieces_going_on(row), parts, reads, strict=True)
        for wave, going_on, of_wave, read in of_row:
            of_tokens, scores, queries, keys, kept = of_wave
            if state is not None:
                state = state[wave.before]
                if read is not None:
                    of_tokens = of_tokens - read @ state
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
        """See `ComputedRule.maps`. The factor is a number where tokens write without reading."""
        keys = self.keys.shape[-1]
        size = 1 if self.reads is None else keys
        first = row.waves[0]
        state = self.keys.new_ones(keys, 1)
        if self.reads is not None:
            state = torch.eye(keys, dtype=state.dtype, device=state.device)
        state = state.expand(first.pieces, self.keys.shape[1], -1, -1)
        if added:
            state = F.pad(state, (0, self.new.shape[-1]))
        ends = []
        for wave, going_on in zip(row.waves, _pieces_going_on(row), strict=True):
            here = slice(wave.chunks.start, wave.chunks.start + wave.pieces)
            state = state[: wave.pieces]
            behind = state * self.kept[here]
            if self.reads is not None:
                behind = behind - self.keys[here].mT @ (self.reads[here] @ state)
            if added:
                behind = behind + F.pad(self.keys[here].mT @ self.new[here], (size, 0))
            state = behind
            ends.append(state[going_on:])
        return torch.cat(ends[::-1])


def _pieces_going_on(row: Recurrence[Tensor]) -> list[int]:
    """For each wave, how many of its pieces have chunks in the next one too.

    They are the first of its pieces: longer pieces come first. So what ends in the waves, the last
    wave first, is in the order of the pieces.
    """
    return [wave.pieces for wave in row.waves[1:]] + [0]


def in_chunks(x: Tensor, chunks: Tensor) -> Tensor:
    """[T, H, ...] -> [C, H, c, ...], 0 where a chunk is filled up."""
    with_zeros = torch.cat((x, x.new_zeros(1, *x.shape[1:])))
    return with_zeros[chunks].transpose(1, 2)


def decays(g: Tensor) -> Tensor:
    """[C, H, c, c] the decay from each token of a chunk to each later one; 0 to earlier ones.

    Sums of what lies between the two: differences of sums from the chunk's beginning would lose
    digits.

    Args:
        g: [C, H, c] logarithms of the decay.
    """
    size = g.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=g.device).tril(-1)
    between = torch.where(later, g[..., :, None], 0).cumsum(-2)
    return between.masked_fill(later.mT, float("-inf")).exp()
