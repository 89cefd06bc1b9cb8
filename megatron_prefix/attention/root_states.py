"""What recurrent layers keep of a prompt that several rows go on from, and what comes back for it.

In a series of rows (see `root_keys.py`) a recurrent layer has no keys that a later row could attend
to. Such a row goes on from the state behind the root, and its convolution reads the root's last
inputs. Gradients of both are added up, and backward of the root's row, which comes last, takes the
sums as what flows into them from later rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(kw_only=True)
class Kept:
    """A tensor of the root's row that later rows go on from."""

    value: Tensor
    gradient: Tensor | None = None
    """What later rows have added up so far, in float32 or wider; None: nothing yet."""

    def leaf(self) -> Tensor:
        """The value for one later row, whose backward adds its gradient to the sum."""
        leaf = self.value.detach().requires_grad_()
        leaf.register_hook(self._add)
        return leaf

    def _add(self, gradient: Tensor) -> None:
        if self.gradient is None:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            self.gradient = torch.zeros_like(gradient, dtype=wide)
        self.gradient += gradient


@dataclass(frozen=True, kw_only=True, eq=False)
class RootStates:
    """What the recurrent layers of this rank keep, by their numbers."""

    inputs: dict[int, Kept] = field(default_factory=dict)
    """[n, d] the root's last inputs of the convolution, one less than its width, or all there
    are."""
    states: dict[int, Kept] = field(default_factory=dict)
    """[H, K, V] the state behind the root, in float32 or wider."""

    def clear(self) -> None:
        """Keep nothing any longer."""
        self.inputs.clear()
        self.states.clear()


def keep(kept: dict[int, Kept], number: int, value: Tensor, along: Tensor) -> Tensor:
    """Keep a copy of a layer's tensor of the root's row.

    A gradient that has been added up stays, since activation recompute runs the root's forward once
    more before its backward.

    Args:
        kept: of all layers.
        number: of the layer.
        value: what is kept.
        along: what the row itself goes on with.

    Returns:
        `along`; in its backward `value` gets the gradient of later rows.
    """
    of_layer = kept.setdefault(number, Kept(value=value))
    of_layer.value = value.detach().clone()
    return _GradientOfLaterRows.apply(along, value, of_layer)


class _GradientOfLaterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, along: Tensor, value: Tensor, kept: Kept) -> Tensor:
        """The first tensor as it is."""
        ctx.kept, ctx.dtype = kept, value.dtype
        return along.view_as(along)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_along: Tensor) -> tuple[Tensor | None, ...]:
        """The second tensor has the gradient that later rows have given back."""
        sums = ctx.kept.gradient
        return d_along, None if sums is None else sums.to(ctx.dtype), None
