"""The attention of one packed row, as a few variable-length calls (stages) on slices of it.

Stage 0 is the self stage: every segment attends to itself, causally, over the whole row. The others
are cross stages: the segments of one level attend to their ancestors on another, without a mask.
Packing in level order makes queries and keys of each stage contiguous, so that a stage needs no
gather and no copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.device_copy import copy_to_device
from megatron_prefix.layout import AttentionStage, PackedLayout, trim_stages


@dataclass(frozen=True, kw_only=True)
class StageTensors:
    """One variable-length attention call."""

    causal: bool
    """Causal squares, else full rectangles."""
    queries: slice | Tensor
    """The stage's query tokens among those that attend: a slice, or (seldom) [n] int64 rows."""
    keys: slice | Tensor
    """The stage's key tokens in the row, or in the buffer of keys that it is called with: a slice,
    or (seldom, in a trimmed last layer) [n] int64 rows."""
    cu_q: Tensor
    """[n+1] int32: bounds of the n rectangles' queries, relative to `queries`."""
    cu_k: Tensor
    """[n+1] int32: bounds of the n rectangles' keys, relative to `keys`."""
    max_q: int
    """The longest rectangle's number of queries."""
    max_k: int
    """The longest rectangle's number of keys."""


def stage_tensors(
    stages: Iterable[AttentionStage], device: torch.device | str
) -> tuple[StageTensors, ...]:
    """The same stages with their tensors on `device`, in one copy that nobody waits for."""
    stages = tuple(stages)
    arrays = []
    for stage in stages:
        arrays += [np.asarray(x, dtype=np.int32) for x in (stage.cu_q, stage.cu_k)]
        chosen = [x for x in (stage.query_rows, stage.key_rows) if x is not None]
        arrays += [np.asarray(x, dtype=np.int64) for x in chosen]
    tensors = iter(copy_to_device(arrays, device))

    def rows(start: int, stop: int, rows: np.ndarray | None) -> slice | Tensor:
        return slice(start, stop) if rows is None else next(tensors)

    # Arguments are evaluated in the order of the arrays.
    return tuple(
        StageTensors(
            causal=stage.causal,
            cu_q=next(tensors),
            cu_k=next(tensors),
            queries=rows(stage.q_start, stage.q_stop, stage.query_rows),
            keys=rows(stage.k_start, stage.k_stop, stage.key_rows),
            max_q=stage.max_q,
            max_k=stage.max_k,
        )
        for stage in stages
    )


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """The stages of one packed row, in the order in which they are computed and added up."""

    stages: tuple[StageTensors, ...]
    """The self stage over the whole row, then the cross stages."""
    num_tokens: int
    """Tokens of the packed row, with padding: keys and values."""
    source: tuple[AttentionStage, ...]
    """What `stages` were made of."""
    device: torch.device | str

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
        return cls(
            stages=stage_tensors(layout.stages, device),
            num_tokens=layout.num_tokens,
            source=layout.stages,
            device=device,
        )

    def trimmed(self, kept: np.ndarray) -> AttentionPlan:
        """The plan of a layer in which only some tokens attend.

        Args:
            kept: [T] bool, from `rows_to_keep`.
        """
        stages = trim_stages(self.source, kept)
        return dataclasses.replace(
            self,
            stages=stage_tensors(stages, self.device),
            source=stages,
        )

    @property
    def self_stage(self) -> AttentionStage:
        """The causal squares of all tokens that attend."""
        return self.source[0]

    @property
    def num_queries(self) -> int:
        """Tokens that attend: all of the row, unless the plan is trimmed."""
        return int(self.self_stage.cu_q[-1])
