"""Tokens of a row with its padding."""

from __future__ import annotations

from megatron_prefix.layout.tree_shape import TreeShape


def activation_tokens(tree: TreeShape, *, pad_to_multiple: int = 1) -> int:
    """Tokens of the packed row, padding included: what activations are held for.

    A token budget is in these. At least one token, also for an empty tree.
    """
    return padded_tokens(tree.grouped_tokens, pad_to_multiple)


def padded_tokens(tokens: int, multiple: int) -> int:
    """Tokens of the shortest row that holds so many: a multiple of `multiple`, never empty."""
    return -(-max(tokens, 1) // multiple) * multiple
