"""Random inputs for the property tests, small enough for brute force and rich in corner cases."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from megatron_prefix.layout import ModelShape, PrefixTree

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=32,
    gated_linear_unit=True,
)
SEVEN_B = ModelShape(
    num_layers=28,
    hidden_size=3584,
    ffn_hidden_size=18944,
    num_attention_heads=28,
    num_query_groups=4,
    kv_channels=128,
    vocab_size=152064,
    gated_linear_unit=True,
)


def token_lists(*, min_size: int = 1, max_size: int = 6) -> st.SearchStrategy[list[int]]:
    """Few different tokens, so that lists often begin alike, or one with the other."""
    return st.lists(st.integers(0, 2), min_size=min_size, max_size=max_size)


def sequence_lists(
    *, min_size: int = 0, max_size: int = 8, max_length: int = 7
) -> st.SearchStrategy[list[list[int]]]:
    """Identical sequences, sequences that end inside others, and unrelated ones."""
    return st.lists(
        token_lists(min_size=2, max_size=max_length), min_size=min_size, max_size=max_size
    )


def group_lists(
    *, max_groups: int = 5, max_responses: int = 5, max_tokens: int = 6
) -> st.SearchStrategy[list[tuple[list[int], list[list[int]]]]]:
    """(prefix, responses) groups, one-token prefixes and responses among them."""
    tokens = token_lists(max_size=max_tokens)
    responses = st.lists(tokens, min_size=1, max_size=max_responses)
    return st.lists(st.tuples(tokens, responses), max_size=max_groups)


@st.composite
def trees(draw: st.DrawFn, *, max_nodes: int = 12, max_depth: int = 6) -> PrefixTree:
    """Any forest, with and without keys: only children, one-token roots, equal siblings, sequences
    that end inside."""
    num_nodes = draw(st.integers(0, max_nodes))
    paths: list[tuple[int, ...]] = []
    for node in range(num_nodes):
        above = [-1, *(p for p in range(node) if len(paths[p]) < max_depth)]
        parent = draw(st.sampled_from(above))
        paths.append((*(paths[parent] if parent >= 0 else ()), node))
    lengths = draw(st.lists(st.integers(1, 4), min_size=num_nodes, max_size=num_nodes))
    inner = {path[-2] for path in paths if len(path) > 1}
    leaves = [node for node in range(num_nodes) if node not in inner]
    for node in leaves:
        if len(paths[node]) == 1:
            # A sequence has at least two tokens.
            lengths[node] += 1
    can_end = [n for n in inner if sum(lengths[m] for m in paths[n]) > 1] + leaves
    extra = draw(st.lists(st.sampled_from(can_end), max_size=3)) if can_end else []
    keys = None
    if draw(st.booleans()):
        keys = tuple(
            np.array(draw(token_lists(min_size=n, max_size=n)), dtype=np.int64) for n in lengths
        )
    return PrefixTree(
        parents=tuple(path[-2] if len(path) > 1 else -1 for path in paths),
        tokens=tuple(
            np.array(draw(token_lists(min_size=n, max_size=n)), dtype=np.int64) for n in lengths
        ),
        keys=keys,
        sequences=tuple(draw(st.permutations([paths[node] for node in [*leaves, *extra]]))),
    )


@st.composite
def trees_below_a_root(draw: st.DrawFn) -> PrefixTree:
    """Any forest as what one root of at least two tokens continues into."""
    below = draw(trees(max_nodes=10, max_depth=4).filter(lambda tree: tree.num_nodes > 0))
    length = draw(st.integers(2, 6))
    return PrefixTree(
        parents=(-1, *(parent + 1 for parent in below.parents)),
        tokens=(
            np.array(draw(token_lists(min_size=length, max_size=length)), dtype=np.int64),
            *below.tokens,
        ),
        sequences=tuple((0, *(node + 1 for node in path)) for path in below.sequences),
    )
