"""Splits a variable-length call into batches of equal shape, which is what torch's CPU op takes.

A batch reads packed rows [tokens, heads, ...] as [count, heads, length, ...] and writes them back.

Consecutive rectangles of equal shape are one batch of views, without copies. Short causal segments
are collected wherever they lie and padded at their ends to one length, since a call for each would
cost more than its arithmetic. Padding is exact: a real query sees no key behind it, and a padded
query has a zero dout.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.attention.kernels.base import Rectangles

_SHORT = 64
"""Causal segments of at most so many tokens are padded, to less than twice their length."""


@dataclass(frozen=True, kw_only=True)
class EqualRows:
    """`count` runs of `length` rows each, one behind the other."""

    start: int
    count: int
    length: int

    def read(self, x: Tensor) -> Tensor:
        """These rows of the packed x, as a view [count, heads, length, ...]."""
        rows = x[self.start : self.start + self.count * self.length]
        return rows.view(self.count, self.length, *x.shape[1:]).transpose(1, 2)

    def write(self, x: Tensor, value: Tensor) -> Tensor:
        """The packed x with these rows replaced; value itself where they are all there is."""
        if self.count * self.length == x.shape[0]:
            return value.transpose(1, 2).flatten(0, 1)
        self.read(x).copy_(value)
        return x


@dataclass(frozen=True, kw_only=True)
class PaddedRows:
    """Runs of rows of unequal lengths, anywhere in the packed tensor, padded with zeros."""

    count: int
    length: int
    rows: Tensor
    """[n] int64: where they lie in the packed tensor."""
    slots: Tensor
    """[n] int64: where they lie in the padded one, count and length flattened."""

    @classmethod
    def collect(cls, runs: list[EqualRows]) -> PaddedRows:
        """All of these runs, padded to the longest."""
        starts = np.concatenate([run.start + run.length * np.arange(run.count) for run in runs])
        lengths = np.repeat([run.length for run in runs], [run.count for run in runs])
        longest, num_rows = int(lengths.max()), int(lengths.sum())
        offsets = np.arange(num_rows) - np.repeat(lengths.cumsum() - lengths, lengths)
        slots = np.repeat(longest * np.arange(len(lengths)), lengths) + offsets
        return cls(
            count=len(lengths),
            length=longest,
            rows=torch.from_numpy(np.repeat(starts, lengths) + offsets),
            slots=torch.from_numpy(slots),
        )

    def read(self, x: Tensor) -> Tensor:
        """A copy of these rows of the packed x as [count, heads, length, ...]."""
        padded = x.new_zeros(self.count * self.length, *x.shape[1:])
        padded[self.slots] = x[self.rows]
        return padded.view(self.count, self.length, *x.shape[1:]).transpose(1, 2)

    def write(self, x: Tensor, value: Tensor) -> Tensor:
        """The packed x with these rows replaced by the batched value, without its padding."""
        x[self.rows] = value.transpose(1, 2).flatten(0, 1)[self.slots]
        return x

    def add(self, x: Tensor, value: Tensor) -> Tensor:
        """The packed x, with the batched value added to these rows, without its padding."""
        return x.index_add_(0, self.rows, value.transpose(1, 2).flatten(0, 1)[self.slots])


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rectangles, or blocks of them, that are computed by one call."""

    queries: EqualRows | PaddedRows
    keys: EqualRows | PaddedRows
    mask: Tensor | None = None
    """[1, 1, queries, keys] float32: added to the scores of every block and head."""


def split_into_batches(on: Rectangles) -> tuple[Batch, ...]:
    """Batches that together hold every rectangle once; those without queries have length 0."""
    return _split(tuple(on.cu_q.tolist()), tuple(on.cu_k.tolist()), on.causal)


@functools.lru_cache(maxsize=256)  # every layer, forward and backward, asks for the same few
def _split(q_bounds: tuple[int, ...], k_bounds: tuple[int, ...], causal: bool) -> tuple[Batch, ...]:
    q_lengths = [stop - start for start, stop in itertools.pairwise(q_bounds)]
    k_lengths = [stop - start for start, stop in itertools.pairwise(k_bounds)]
    shapes = list(zip(q_lengths, k_lengths, strict=True))
    batches: list[Batch] = []
    short: dict[int, list[EqualRows]] = {}
    for (q_length, k_length), same in itertools.groupby(range(len(shapes)), shapes.__getitem__):
        first, *others = same
        count = 1 + len(others)
        keys = EqualRows(start=k_bounds[first], count=count, length=k_length)
        if causal and q_length <= _SHORT:
            short.setdefault((q_length - 1).bit_length(), []).append(keys)
        else:
            queries = EqualRows(start=q_bounds[first], count=count, length=q_length)
            batches.append(Batch(queries=queries, keys=keys))
    for runs in short.values():
        rows = runs[0] if len(runs) == 1 else PaddedRows.collect(runs)
        batches.append(Batch(queries=rows, keys=rows))
    return tuple(batches)
