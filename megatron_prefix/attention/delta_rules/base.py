"""The contract of what computes the gated delta rule of a row.

Shapes of this folder: T tokens, H heads, K and V the sizes of keys and values. A piece is a part of
a sharded segment, see `layout.shared_states`.

    q, k [T, H, K]    v [T, H, V]    g, beta [T, H]    states [n, H, K, V], in float32 or wider
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_prefix.attention.recurrent_rule import ComputedRule
from megatron_prefix.layout import Recurrence


@dataclass(frozen=True, kw_only=True)
class RuleInputs:
    """What a rule is asked to compute."""

    device: torch.device
    dtype: torch.dtype
    """Of q, k and v."""
    key_dim: int
    """K"""
    deterministic: bool = False
    """The same inputs give the same bits in every run."""


class DeltaRule(Protocol):
    """One implementation of the gated delta rule."""

    name: str
    """What `select_delta_rule` and the configuration call it."""

    def unsupported(self, inputs: RuleInputs) -> str | None:
        """Why this rule cannot run here, as the end of a sentence; None if it can."""
        ...

    def of(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, row: Recurrence[Tensor]
    ) -> ComputedRule:
        """The rule of a row; see `gated_delta_rule`."""
        ...
