"""Which part of which whole tensor this rank's parameters are, by Megatron's sharded state dict.

The one that checkpoints are written by: any layout of the same model has the same keys and shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor

from megatron_prefix.model.build import ModelChunks

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ParameterShard:
    """A part of a whole tensor."""

    key: str
    """In a distributed checkpoint; a layer's parameters are stacked along leading axes there."""
    global_shape: Shape
    """Of the whole tensor, the leading axes included."""
    index: Shape
    """The layer's and expert's place along the leading axes."""
    place: tuple[slice, ...]
    """The part of the other axes."""
    may_be_padded: bool
    """Rows beyond the vocabulary may be there, as many as the layout asks for."""
    data: Tensor
    """A view of the parameter."""


def parameter_shards(chunks: ModelChunks) -> Iterator[ParameterShard]:
    """All parts that this rank holds, in the model's order."""
    for chunk in chunks.bare:
        state: dict[str, Any] = chunk.sharded_state_dict()
        apply_factories(state)
        for item in nested_values(state):
            # Extra states (Transformer Engine's) are objects, not parameters.
            if not isinstance(item, ShardedTensor):
                continue
            leading = item.prepend_axis_num
            starts = item.global_offset[leading:]
            yield ParameterShard(
                key=item.key,
                global_shape=tuple(item.global_shape),
                index=tuple(item.global_offset[:leading]),
                place=tuple(
                    slice(start, start + length)
                    for start, length in zip(starts, item.local_shape, strict=True)
                ),
                may_be_padded=item.allow_shape_mismatch,
                data=item.data,
            )
