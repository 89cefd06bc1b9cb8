"""Several rewards of a response by name, and their weighted sum, which it is trained by.

A record gives them as an object in place of numbers:

    {"prompt": ..., "responses": ..., "rewards": {"correct": [1.0, 0.0], "brief": [0.3, 0.9]}}
    {"group": "a", "prompt": ..., "response": ..., "reward": {"correct": 1.0, "brief": 0.3}}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.rollouts.kinds import NUMBERS, read_item, read_list
from megatron_prefix.rollouts.record import Record


def weighted_sum(
    named: Mapping[str, NDArray[np.float64]], weights: Mapping[str, float]
) -> NDArray[np.float64]:
    """[R] for each response the sum of weight * reward, in the order of the weights.

    Args:
        named: [R] each, of the names that `weights` has.
        weights: at least one.
    """
    # Added up one name after the other, so that responses of equal rewards have equal sums to the
    # bit: their advantages are 0.
    total = np.zeros(len(next(iter(named.values()))))
    for name, weight in weights.items():
        total = total + weight * named[name]
    return total


def weighted_record(record: Record, weights: Mapping[str, float] | None) -> Record:
    """The record with the weighted sum in the place of its rewards by name.

    Args:
        record: in this package's own form.
        weights: `objective.reward_weights`.

    Raises:
        ValueError: names other than those of the weights, rewards without names where there are
            weights or the other way round, or what is no finite number.
    """
    if weights is not None and "turn_rewards" in record.values:
        raise ValueError(
            f"{record.source}: turn_rewards: have no names, and objective.reward_weights weighs "
            "rewards by name; leave out one of the two"
        )
    for field in ("rewards", "reward"):
        value = record.values.get(field)
        where = f"{record.source}: {field}"
        if isinstance(value, Mapping):
            named = _named(value, weights, where, of_group=field == "rewards")
            assert weights is not None
            total = weighted_sum(named, weights)
            values = {**record.values, field: total if field == "rewards" else float(total[0])}
            return dataclasses.replace(record, values=values, named_rewards=named)
        if value is not None and weights is not None:
            raise ValueError(
                f"{where}: has no names, and objective.reward_weights weighs rewards by name; give "
                f"an object with {', '.join(weights)}, or remove objective.reward_weights"
            )
    return record


def _named(
    given: Mapping[str, Any], weights: Mapping[str, float] | None, where: str, *, of_group: bool
) -> dict[str, NDArray[np.float64]]:
    """[R] each, checked."""
    given = {name: value for name, value in given.items() if value is not None}
    if weights is None:
        raise ValueError(
            f"{where}: several by name ({', '.join(given)}); set objective.reward_weights to a "
            "weight for each"
        )
    for name in weights:
        if name not in given:
            raise ValueError(f"{where}.{name}: missing, and objective.reward_weights weighs it")
    for name in given:
        if name not in weights:
            raise ValueError(
                f"{where}.{name}: has no weight in objective.reward_weights; give it one (0 "
                "reports it only), or leave it out"
            )
    first = next(iter(weights))
    found: dict[str, NDArray[np.float64]] = {}
    for name in weights:
        read = read_list if of_group else read_item
        values = found[name] = read(given[name], f"{where}.{name}", NUMBERS)
        if len(values) != len(found[first]):
            raise ValueError(
                f"{where}.{name}: {len(values)}, and {len(found[first])} of {first}; there must be "
                "one for each response"
            )
    return found
