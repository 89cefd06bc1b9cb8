"""Where sharing pays: a shared run saves its tokens and costs those below it a cross stage.

A cross stage is more attention calls, and the merge of two outputs. Both constants below were
measured on the CPU (forward and backward of attention with and without a short shared prefix, 8
heads of 32): 35 to 140 keys per token at responses of 128 to 512 tokens, and a break-even near 8
saved tokens where responses are short. Not measured on a GPU. Whatever is decided, results are the
same.

Layers with a sliding window have no cross stages. What they copy of a shared run for those below it
is not counted.
"""

from __future__ import annotations

from collections.abc import Collection

from megatron_prefix.layout.cost import ModelShape
from megatron_prefix.layout.pairs import attention_pairs_of
from megatron_prefix.layout.tree_shape import AnyTree, TreeShape

MERGE_KEYS = 128
"""A cross stage costs each of its queries what attending to so many more keys would."""

STAGE_TOKENS = 8
"""A cross stage costs what the matrix products of so many tokens would, whatever its size."""


def share_where_it_pays(
    tree: AnyTree,
    shape: ModelShape,
    *,
    token_budget: int | None = None,
    always_roots: bool = False,
) -> AnyTree:
    """The same sequences, with only those nodes shared that save more FLOPs than they cost.

    Decided from the roots on: tokens of a node that is not shared count as its children's. A
    function of lengths and sizes alone, so all ranks decide alike.

    Args:
        tree: what could be shared.
        shape: the model.
        token_budget: where not sharing would pack to more tokens than this, all is shared.
        always_roots: roots stay shared, whether it pays or not.
    """
    found = tree.without(_not_worth_sharing(tree, shape, always_roots))
    if token_budget is not None and found.grouped_tokens > token_budget:
        return tree
    return found


def _not_worth_sharing(tree: TreeShape, shape: ModelShape, always_roots: bool) -> Collection[int]:
    lengths = tree.packed_lengths.tolist()
    below = list(lengths)
    branches = [0] * tree.num_nodes
    has_children = [False] * tree.num_nodes
    for node in range(tree.num_nodes - 1, -1, -1):
        parent = tree.parents[node]
        if parent >= 0:
            below[parent] += below[node]
            branches[parent] += 1
            has_children[parent] = True
    for node in {path[-1] for path in tree.sequences}:
        branches[node] += has_children[node]  # sequences that end above others

    first_positions = tree.first_positions.tolist()
    dissolved: set[int] = set()
    carried = [0] * tree.num_nodes
    """Tokens above each node that are not shared, and so belong to it."""
    for node, parent in enumerate(tree.parents):
        if parent in dissolved:
            carried[node] = carried[parent] + lengths[parent]
        if not has_children[node] or branches[node] < 2:
            continue  # nothing is shared here; chains are merged when packed
        if parent < 0 and always_roots:
            continue
        tokens = carried[node] + lengths[node]
        first = first_positions[node] - carried[node]
        pairs = attention_pairs_of(tokens, first)
        windowed = shape.windowed_pairs(tokens, first)
        once = shape.flops(tokens=tokens, pairs=pairs, labels=0, windowed_pairs=windowed)
        saved = (branches[node] - 1) * once
        queries = below[node] - lengths[node]
        cost = queries * MERGE_KEYS * shape.attention_flops_per_pair()
        cost += STAGE_TOKENS * shape.linear_flops_per_token()
        if saved <= cost:
            dissolved.add(node)
    return dissolved
