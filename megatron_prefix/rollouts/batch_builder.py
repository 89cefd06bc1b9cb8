"""One rollout batch of several that come one after another, in arrays that grow in place.

A list of the parts would have everything in memory twice while it is joined.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy import typing as npt
from numpy.typing import NDArray

from megatron_prefix.rollouts.records import (
    RolloutBatch,
    check_all_or_none,
    offsets_of,
    records_of,
)

_FIRST_ITEMS = 1 << 12


class BatchBuilder:
    """Copies groups behind those that it has."""

    def __init__(self) -> None:
        """Nothing is there yet."""
        self._prompt_tokens = _GrowingArray(np.int32)
        self._response_tokens = _GrowingArray(np.int32)
        self._old_logprobs = _GrowingArray(np.float32)
        self._optional = {
            "loss_mask": _OptionalArray(np.bool_, absent=True),
            "turn_rewards": _OptionalArray(np.float64, absent=np.nan),
            "advantages": _OptionalArray(np.float64, absent=np.nan),
            "keys": _OptionalArray(np.int64, absent=0),
            "position_shifts": _OptionalArray(np.int32, absent=0, of_item=(3,)),
        }
        self._of_prompts = {
            "prompt_keys": _OptionalArray(np.int64, absent=0),
            "prompt_position_shifts": _OptionalArray(np.int32, absent=0, of_item=(3,)),
        }
        self._routes: _GrowingArray | None = None
        self._named_rewards: dict[str, _OptionalArray] = {}
        self._known: dict[bool, str] = {}
        self._prompt_lengths = _GrowingArray(np.int64)
        self._group_sizes = _GrowingArray(np.int64)
        self._response_lengths = _GrowingArray(np.int64)
        self._rewards = _GrowingArray(np.float64)
        self._finished = _GrowingArray(np.int8)
        self._policy_versions = _GrowingArray(np.int64)
        self._answers: list[Any] = []
        self._sources: list[str] = []
        self._records: list[Mapping[str, Any]] = []

    def add(self, batch: RolloutBatch) -> None:
        """Copy the groups of a batch, at least one.

        Raises:
            ValueError: it has old log-probabilities and another has not, or the other way round.
        """
        self._known.setdefault(batch.old_logprobs is not None, batch.sources[0])
        check_all_or_none(self._known)
        for name, array in self._optional.items():
            array.extend(getattr(batch, name), len(batch.response_tokens))
        for name, array in self._of_prompts.items():
            array.extend(getattr(batch, name), len(batch.prompt_tokens))
        self._add_routes(batch)
        self._add_named_rewards(batch)
        self._prompt_tokens.extend(batch.prompt_tokens)
        self._response_tokens.extend(batch.response_tokens)
        if batch.old_logprobs is not None:
            self._old_logprobs.extend(batch.old_logprobs)
        self._prompt_lengths.extend(np.diff(batch.prompt_offsets))
        self._group_sizes.extend(np.diff(batch.group_offsets))
        self._response_lengths.extend(np.diff(batch.response_offsets))
        self._rewards.extend(batch.rewards)
        self._finished.extend(batch.finished)
        self._policy_versions.extend(batch.policy_versions)
        self._answers.extend(batch.answers)
        self._sources.extend(batch.sources)
        self._records.extend(batch.records or [{}] * batch.num_groups)

    def _add_routes(self, batch: RolloutBatch) -> None:
        """All batches have routes, of one model, or none has any."""
        routes = batch.routes
        assert (routes is None) == (self._routes is None) or not self._sources
        if routes is None:
            return
        if self._routes is None:
            self._routes = _GrowingArray(routes.dtype, routes.shape[1:])
        self._routes.extend(routes)

    def _add_named_rewards(self, batch: RolloutBatch) -> None:
        for name in batch.named_rewards:
            if name not in self._named_rewards:
                self._named_rewards[name] = _OptionalArray(np.float64, absent=np.nan)
                self._named_rewards[name].extend(None, self._rewards.size)
        for name, array in self._named_rewards.items():
            array.extend(batch.named_rewards.get(name), batch.num_responses)

    def build(self) -> RolloutBatch:
        """The batch of all groups; nothing can be added any more."""
        return RolloutBatch(
            prompt_tokens=self._prompt_tokens.finish(),
            prompt_offsets=offsets_of(self._prompt_lengths.finish()),
            group_offsets=offsets_of(self._group_sizes.finish()),
            response_tokens=self._response_tokens.finish(),
            response_offsets=offsets_of(self._response_lengths.finish()),
            rewards=self._rewards.finish(),
            named_rewards={
                name: values
                for name, array in self._named_rewards.items()
                if (values := array.finish()) is not None
            },
            old_logprobs=self._old_logprobs.finish() if True in self._known else None,
            **{name: array.finish() for name, array in self._optional.items()},
            **{name: array.finish() for name, array in self._of_prompts.items()},
            routes=None if self._routes is None else self._routes.finish(),
            finished=self._finished.finish(),
            policy_versions=self._policy_versions.finish(),
            answers=tuple(self._answers),
            sources=tuple(self._sources),
            records=records_of(self._records),
        )


class _GrowingArray:
    """An array with room at its end."""

    def __init__(self, dtype: npt.DTypeLike, of_item: tuple[int, ...] = ()) -> None:
        self._array = np.empty((_FIRST_ITEMS, *of_item), dtype=dtype)
        self.size = 0
        """Items that are there."""

    def extend(self, values: NDArray) -> None:
        stop = self.size + len(values)
        if stop > len(self._array):
            # The system moves the pages of a large array and copies nothing. No view of it exists.
            self._resize(max(stop, len(self._array) * 5 // 4))
        self._array[self.size : stop] = values
        self.size = stop

    def finish(self) -> NDArray:
        self._resize(self.size)
        self._array.flags.writeable = False
        return self._array

    def _resize(self, size: int) -> None:
        self._array.resize((size, *self._array.shape[1:]), refcheck=False)


class _OptionalArray:
    """Values of tokens or responses that some groups have; those of all others are `absent`."""

    def __init__(self, dtype: type, *, absent: float, of_item: tuple[int, ...] = ()) -> None:
        self._array = _GrowingArray(dtype, of_item)
        self._absent, self._of_item = absent, of_item
        self._missing = 0
        """How many there are so far, while no group has had any."""
        self._is_there = False

    def extend(self, values: NDArray | None, count: int) -> None:
        """So many values."""
        if values is None and not self._is_there:
            self._missing += count
            return
        if not self._is_there:
            self._is_there = True
            self._array.extend(self._absent_values(self._missing))
        self._array.extend(self._absent_values(count) if values is None else values)

    def _absent_values(self, count: int) -> NDArray:
        return np.full((count, *self._of_item), self._absent)

    def finish(self) -> NDArray | None:
        return self._array.finish() if self._is_there else None
