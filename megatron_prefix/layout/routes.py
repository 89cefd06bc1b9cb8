"""Routes of experts, recorded for each sequence, as values of a packed row.

A route is the experts that each layer sends a token to. Sampling records one for every input of the
model: all tokens of a sequence but the last. It is a part of what a token is: sequences share a
token where their ids and routes agree, for which `route_keys` makes keys.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from megatron_prefix.layout.packing import PackedLayout


def route_keys(routes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Keys for `PrefixTree.from_sequences`: equal where routes are, over all sequences.

    Args:
        routes: of each sequence [length - 1, layers, topk], whole numbers.

    Returns:
        Of each sequence [length] int64; the last token, which has no route, has key 0.

    Raises:
        ValueError: routes of different layers or topk.
    """
    flat = [_flat(index, of_sequence, routes[0]) for index, of_sequence in enumerate(routes)]
    _, numbers = np.unique(np.concatenate(flat), axis=0, return_inverse=True)
    ends = np.cumsum([len(of_sequence) for of_sequence in flat])
    parts = np.split(numbers.reshape(-1).astype(np.int64) + 1, ends[:-1])
    return [np.append(part, 0) for part in parts]


def hashed_keys(length: int, values: Sequence[np.ndarray]) -> np.ndarray:
    """Keys of one sequence, which may be compared with those of sequences that come later.

    Args:
        length: tokens of the sequence.
        values: whole numbers that tell tokens of one id apart, such as keys, positions and routes:
            [length, ...] each, or [length - 1, ...] where the last token has none.

    Returns:
        [length] int64: hashes, 0 where all values are. Of values that differ they are equal by a
        chance of some 2^-56; `PackedLayout.scatter_inputs` then raises an error.
    """
    found = np.zeros(length, dtype=np.uint64)
    flat = [of.reshape(len(of), -1) for of in values]
    factors = _factors(sum(of.shape[1] for of in flat))
    for of in flat:
        # Sums of products modulo 2^64; the array is not copied to a wider type at once.
        own, factors = factors[: of.shape[1]], factors[of.shape[1] :]
        found[: len(of)] += np.einsum("ij,j->i", of, own, dtype=np.uint64, casting="unsafe")
    return found.view(np.int64)


@functools.lru_cache(maxsize=8)
def _factors(count: int) -> np.ndarray:
    """[count] uint64: random and odd, the same ones in every process."""
    return np.random.default_rng(0).integers(0, 2**64, count, dtype=np.uint64) | np.uint64(1)


def _flat(index: int, routes: np.ndarray, first: np.ndarray) -> np.ndarray:
    """[length - 1, layers * topk]"""
    if routes.ndim != 3 or routes.shape[1:] != first.shape[1:]:
        raise ValueError(
            f"sequence {index}: routes {routes.shape}, but those of sequence 0 are {first.shape}; "
            "expected [length - 1, layers, topk] with the same layers and topk"
        )
    return routes.reshape(len(routes), -1)


def routes_of_row(
    layout: PackedLayout, routes: Sequence[np.ndarray], *, num_experts: int
) -> np.ndarray:
    """[T, layers, topk] int64: the routes of a packed row's tokens.

    Args:
        layout: the packed row.
        routes: of each sequence [length - 1, layers, topk], layers with experts only.
        num_experts: of the model.

    Returns:
        For `PrefixPackedSeqParams.from_layout(routes=)`. Padding goes to the first experts.

    Raises:
        ValueError: an expert that the model does not have, or the same one twice for a token; not
            as many routes as inputs; two sequences that share a token with different routes.
    """
    for index, of_sequence in enumerate(routes):
        _flat(index, of_sequence, routes[0])
        check_experts(f"sequence {index}", of_sequence, num_experts)
    return scatter_routes(layout, [found.astype(np.int64, copy=False) for found in routes])


def scatter_routes(layout: PackedLayout, routes: Sequence[np.ndarray]) -> np.ndarray:
    """The same as `routes_of_row` of routes that have been checked, in their own type."""
    row = layout.scatter_inputs(routes)
    row[layout.num_tokens - layout.num_padding :] = np.arange(row.shape[-1])
    return row


def check_experts(where: str, routes: np.ndarray, num_experts: int) -> None:
    """Refuse routes that a model cannot take.

    Args:
        where: how the error begins.
        routes: [inputs, layers, topk]
        num_experts: of the model.

    Raises:
        ValueError: an expert that the model does not have, or the same one twice for a token.
    """
    wrong = (routes < 0) | (routes >= num_experts)
    if wrong.any():
        token, layer, place = np.argwhere(wrong)[0].tolist()
        raise ValueError(
            f"{where}: token {token}: layer {layer}: expert "
            f"{routes[token, layer, place]} is none of the model's {num_experts}"
        )
    ordered = np.sort(routes, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
    if twice.any():
        token, layer = np.argwhere(twice)[0].tolist()
        raise ValueError(
            f"{where}: token {token}: layer {layer}: the experts "
            f"{routes[token, layer].tolist()} name one twice"
        )
