"""The attention of one packed row, as a few variable-length calls (stages) on slices of it.

Stage 0 is the self stage: every segment attends to itself, causally, over the whole row. The others
are cross stages: the segments of one level attend to their ancestors on another, without a mask.
Packing in level order makes queries and keys of each stage contiguous, so that a stage needs no
gather and no copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_prefix.layout.packing import PackedLayout


@dataclass(frozen=True, kw_only=True)
class StageTensors:
    """One variable-length attention call."""

    causal: bool
    """Causal squares, else full rectangles."""
    queries: slice
    """The stage's query tokens in the packed row."""
    keys: slice
    """The stage's key tokens in the packed row."""
    cu_q: Tensor
    """[n+1] int32: bounds of the n rectangles' queries, relative to `queries`."""
    cu_k: Tensor
    """[n+1] int32: bounds of the n rectangles' keys, relative to `keys`."""
    max_q: int
    """The longest rectangle's number of queries."""
    max_k: int
    """The longest rectangle's number of keys."""


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """The stages of one packed row, in the order in which they are computed and added up."""

    stages: tuple[StageTensors, ...]
    """The self stage over the whole row, then the cross stages."""
    num_tokens: int
    """Tokens of the packed row, with padding."""

    @classmethod
    def from_layout(cls, layout: PackedLayout, device: torch.device | str = "cpu") -> AttentionPlan:
        """The plan of a packed layout, with its tensors on `device`.

        Args:
            layout: anything with the `stages` and `num_tokens` of a `PackedLayout`.
            device: where q, k and v will be.
        """
        self_stage = layout.stages[0]
        assert self_stage.causal, "the first stage is the self stage"
        assert (self_stage.q_start, self_stage.q_stop) == (0, layout.num_tokens)

        def bounds(cu_seqlens: np.ndarray) -> Tensor:
            return torch.tensor(cu_seqlens, dtype=torch.int32).to(device, non_blocking=True)

        stages = tuple(
            StageTensors(
                causal=stage.causal,
                queries=slice(stage.q_start, stage.q_stop),
                keys=slice(stage.k_start, stage.k_stop),
                cu_q=bounds(stage.cu_q),
                cu_k=bounds(stage.cu_k),
                max_q=stage.max_q,
                max_k=stage.max_k,
            )
            for stage in layout.stages
        )
        return cls(stages=stages, num_tokens=layout.num_tokens)
