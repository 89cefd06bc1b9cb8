"""Keys from elsewhere, behind those of a row: what a layer with a sliding window sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Halo(Protocol):
    """Rows of keys and values that the stage of a layer has behind the row's own."""

    def extend(self, k: Tensor, v: Tensor, *, in_backward: bool) -> tuple[Tensor, Tensor]:
        """The row's keys and values, and behind them those from elsewhere."""
        ...

    def give_back(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Send the gradients of rows from elsewhere to where they came from.

        Args:
            gradients: of the extended keys and values, in float32 or wider.

        Returns:
            Those of the row's own keys and values.
        """
        ...
