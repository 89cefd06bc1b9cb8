"""Which sequences of a group are the same, and how far their prompts are.

A token is what its id says and what its id leaves open: key, positions, experts it is sent to.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.rollouts.summary import PromptRoutes

if TYPE_CHECKING:  # which imports this file
    from megatron_prefix.rollouts.records import RolloutBatch


def repeated_responses(batch: RolloutBatch) -> NDArray[np.bool_]:
    """[R] whether a response is one of its group before it, see `RolloutSummary.repeated`."""
    repeated = np.zeros(batch.num_responses, dtype=np.bool_)
    for group in range(batch.num_groups):
        seen: set[tuple[bytes, ...]] = set()
        for response in batch.responses_of(group):
            where = batch.tokens_of(response)
            values = [batch.response_tokens[where]]
            values += [of[where] for of in (batch.keys, batch.position_shifts) if of is not None]
            if batch.routes is not None:
                values.append(batch.routes_of(response))
            identity = tuple(of.tobytes() for of in values)
            repeated[response] = identity in seen
            seen.add(identity)
    return repeated


def prompt_routes(batch: RolloutBatch) -> PromptRoutes:
    """How far routes agree in the prompts of a batch that has routes."""
    orders, shared = [], []
    for group in range(batch.num_groups):
        length = len(batch.prompt(group))
        routes = [batch.routes_of(response)[:length] for response in batch.responses_of(group)]
        order = sorted(range(len(routes)), key=[of.tobytes() for of in routes].__getitem__)
        orders += order
        shared += [0, *(_common(routes[a], routes[b]) for a, b in itertools.pairwise(order))]
    return PromptRoutes(
        order=np.array(orders, dtype=np.int32), shared=np.array(shared, dtype=np.int32)
    )


def _common(one: NDArray, other: NDArray) -> int:
    """Items that two arrays of one shape begin with alike."""
    differs = (one != other).any(axis=tuple(range(1, one.ndim)))
    return int(differs.argmax()) if differs.any() else len(one)
