"""The causal convolution of recurrent layers along the paths of a row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_prefix.layout import Recurrence


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
        weight: [d, width], that of the token's own input last; no wider than the row's inputs.
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
    inputs = row.inputs[:, row.inputs.shape[1] - weight.shape[1] :]
    out = sum(with_zeros[inputs[:, i]] * weight[:, i] for i in range(weight.shape[1]))
    return out if bias is None else out + bias
