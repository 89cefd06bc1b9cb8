"""A group that is too large for one row, as a series of rows that run its root once.

The root's row comes first. Each row with responses then runs forward and backward, one after the
other, and backward of the root comes last (see `attention.root_keys`). To Megatron's schedule the
series is one microbatch. At a time it holds the activations of the root and of one other row, and
the root's keys, values and their gradients in all layers.

Invariants of a series:

- the root and any one of its other rows together, packed as one row, keep to the token budget (as
  two rows they may be longer by less than one multiple that rows are padded to);
- nothing is trained on in the root's row, so its gradient is what later rows add up;
- `RootKeys` holds nothing before a pass and after it, also where the pass raises an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prefix.attention.root_keys import RootKeys
from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.device_copy import record_to_device
from megatron_prefix.objective import PolicyMetrics
from megatron_prefix.training.batch import HostBatch, PackedBatch, packed_batch


@dataclass(frozen=True, kw_only=True, eq=False)
class HostSeries:
    """A series on the host."""

    root: HostBatch
    """The root alone; nothing is trained on in it."""
    root_tokens: int
    """Positions of the root, without padding."""
    parts: Sequence[HostBatch]
    """The rows with responses, without the root."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchSeries:
    """A series on the device."""

    root: PackedBatch
    rows: tuple[PackedBatch, ...]
    """Those that something is trained on."""
    root_keys: RootKeys

    @property
    def num_tokens(self) -> int:
        """Of the first row, padding included."""
        return self.root.num_tokens


def series_to_device(host: HostSeries, setup: AttentionSetup) -> BatchSeries:
    """A series on the device, in one copy."""
    batches = (host.root, *host.parts)
    tensors = record_to_device(tuple(batch.arrays for batch in batches), setup.device)
    root_keys = RootKeys(host.root_tokens)
    root, *rows = (
        packed_batch(batch, of_batch, setup, root=root_keys, keeps_root=batch is host.root)
        for batch, of_batch in zip(batches, tensors, strict=True)
    )
    return BatchSeries(root=root, rows=tuple(rows), root_keys=root_keys)


def train_series(
    series: BatchSeries,
    run: Callable[[PackedBatch], Tensor],
    loss_of: Callable[[Tensor, PackedBatch], tuple[Tensor, PolicyMetrics]],
) -> PolicyMetrics:
    """A series forward and backward; gradients accumulate in the parameters.

    Args:
        series: what to run.
        run: the model's output for a row.
        loss_of: the loss of an output, as backward is to begin from it, and its metrics.

    Returns:
        The metrics of all rows.
    """

    # In a function, so that a row's graph is gone before the next row runs.
    def train_row(row: PackedBatch) -> PolicyMetrics:
        loss, metrics = loss_of(run(row), row)
        loss.backward()
        return metrics

    with series.root_keys.held():
        root_output = run(series.root)
        first, *others = [train_row(row) for row in series.rows]
        # Zero but for what `RootKeys` adds to it on the way.
        root_output.sum().backward()
    return sum(others, start=first)


@torch.no_grad()
def series_outputs(
    series: BatchSeries, run: Callable[[PackedBatch], Tensor]
) -> Sequence[tuple[Tensor, PackedBatch]]:
    """The model's output for each row that something is trained on, without gradients."""
    with series.root_keys.held():
        run(series.root)
        return [(run(row), row) for row in series.rows]
