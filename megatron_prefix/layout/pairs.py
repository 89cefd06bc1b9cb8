"""Pairs of a query and a key that it sees."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from megatron_prefix.layout.tree_shape import TreeShape

Count = TypeVar("Count", int, np.ndarray)


def attention_pairs(tree: TreeShape) -> np.ndarray:
    """[nodes] int64: keys that each node's queries see, its own causally and all its ancestors'."""
    return attention_pairs_of(tree.packed_lengths, tree.first_positions)


def attention_pairs_of(queries: Count, keys_before: Count | int) -> Count:
    """Pairs of queries that see so many keys before the first of them, and each other causally."""
    return queries * (queries + 1) // 2 + queries * keys_before


def windowed_pairs_of(queries: Count, keys_before: Count | int, window: int) -> Count:
    """The same where a query sees its own key and at most `window` keys right before it."""
    # The first queries see all keys that there are, the others a whole window.
    first = np.minimum(np.maximum(window + 1 - keys_before, 0), queries)
    return attention_pairs_of(first, keys_before) + (queries - first) * (window + 1)
