"""A framework's packed row without its repetitions, and the way back.

Every token of a sequence has a row of the model's output in a framework's row, its last token too.
A `PackedLayout` has rows for the tokens that predict another one. So each sequence gets one token
more, which nothing reads: it is a label only. Sequences of one token need no case of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_prefix.integrations.packed_row import PackedRow
from megatron_prefix.layout import ModelShape, PackedLayout, PrefixTree, pack, share_where_it_pays

_BEHIND_THE_END = np.array([-1], dtype=np.int64)
"""No token of a vocabulary, and the same behind every sequence, so that equal ones stay equal."""


def _lengthened(sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [np.concatenate([values, _BEHIND_THE_END]) for values in sequences]


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedRow:
    """The row that the model runs in place of a framework's.

    Legend: T tokens of the framework's row, N of the one that runs.
    """

    layout: PackedLayout
    """Its `labels` are not a framework's."""
    rows: np.ndarray
    """[T] int64: which of the N rows is each of the framework's. Padding has that of the token
    before it."""
    is_padding: np.ndarray
    """[T] bool: which of the framework's rows belong to no sequence."""

    @classmethod
    def of(cls, row: PackedRow, shape: ModelShape, *, pad_to_multiple: int) -> SharedRow | None:
        """The row without repetitions; None where it has none, or none that pays.

        A function of the tokens, keys and sizes alone, so every pipeline stage finds the same.

        Args:
            row: of the framework.
            shape: of the model, to decide what pays.
            pad_to_multiple: N is a multiple of this.
        """
        keys = row.sequence_keys()
        whole = PrefixTree.from_sequences(
            _lengthened(row.sequences()), keys=None if keys is None else _lengthened(keys)
        )
        tree = share_where_it_pays(whole, shape)
        if not (tree.multiplicity > 1).any():
            return None
        layout = pack(tree, pad_to_multiple=pad_to_multiple)
        rows = np.full(row.num_tokens, -1, dtype=np.int64)
        for i, (start, length) in enumerate(
            zip(row.starts.tolist(), row.lengths.tolist(), strict=True)
        ):
            rows[start : start + length] = layout.sequence_positions(i)
        is_padding = rows < 0
        before = np.maximum.accumulate(np.where(is_padding, 0, np.arange(len(rows))))
        return cls(layout=layout, rows=np.maximum(rows[before], 0), is_padding=is_padding)
