"""One rollout batch of several that come one after another, in arrays that grow in place.

A list of the parts would have everything in memory twice while it is joined.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.rollouts.kinds import offsets_of
from megatron_prefix.rollouts.records import RolloutBatch, check_all_or_none

_FIRST_ITEMS = 1 << 12
_NEEDED = {
    "prompt_tokens": np.int32,
    "response_tokens": np.int32,
    "rewards": np.float64,
    "finished": np.int8,
    "policy_versions": np.int64,
}
"""Arrays that every batch has."""
_OFFSETS = ("prompt_offsets", "group_offsets", "response_offsets")
_OPTIONAL: dict[str, tuple[str, float]] = {
    "old_logprobs": ("response_tokens", np.nan),
    "loss_mask": ("response_tokens", True),
    "turn_rewards": ("response_tokens", np.nan),
    "advantages": ("response_tokens", np.nan),
    "keys": ("response_tokens", 0),
    "position_shifts": ("response_tokens", 0),
    "prompt_keys": ("prompt_tokens", 0),
    "prompt_position_shifts": ("prompt_tokens", 0),
}
"""Arrays that some batches have: which array each goes with, and what groups without it have."""


class BatchBuilder:
    """Copies groups behind those that it has."""

    def __init__(self) -> None:
        """Nothing is there yet."""
        self._arrays = {name: _GrowingArray(np.empty(0, dtype)) for name, dtype in _NEEDED.items()}
        self._lengths = {name: _GrowingArray(np.empty(0, np.int64)) for name in _OFFSETS}
        self._optional: dict[str, _GrowingArray] = {}
        self._named_rewards: dict[str, _GrowingArray] = {}
        self._known: dict[bool, str] = {}
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
        # All batches have routes, of one model, or none has any.
        assert (batch.routes is None) == ("routes" not in self._optional) or not self._sources
        for name, (of, absent) in _OPTIONAL.items():
            values, count = getattr(batch, name), len(getattr(batch, of))
            self._add_optional(self._optional, name, values, (self._arrays[of].size, count), absent)
        self._add_optional(self._optional, "routes", batch.routes, (0, 0), 0)
        counts = (self._arrays["rewards"].size, batch.num_responses)
        for name in {**self._named_rewards, **batch.named_rewards}:
            values = batch.named_rewards.get(name)
            self._add_optional(self._named_rewards, name, values, counts, np.nan)
        for name, array in self._arrays.items():
            array.extend(getattr(batch, name))
        for name, lengths in self._lengths.items():
            lengths.extend(np.diff(getattr(batch, name)))
        self._answers.extend(batch.answers)
        self._sources.extend(batch.sources)
        self._records.extend(batch.records or itertools.repeat({}, batch.num_groups))

    def _add_optional(
        self,
        arrays: dict[str, _GrowingArray],
        name: str,
        values: NDArray | None,
        counts: tuple[int, int],
        absent: float,
    ) -> None:
        """Add values, where there are any by now; `counts` are those before and in this batch."""
        before, count = counts
        if values is not None and name not in arrays:
            arrays[name] = _GrowingArray(values[:0])
            arrays[name].fill(before, absent)
        if values is not None:
            arrays[name].extend(values)
        elif name in arrays:
            arrays[name].fill(count, absent)

    def build(self) -> RolloutBatch:
        """The batch of all groups; nothing can be added any more."""
        return RolloutBatch(
            **{name: array.finish() for name, array in (self._arrays | self._optional).items()},
            **{name: offsets_of(lengths.finish()) for name, lengths in self._lengths.items()},
            named_rewards={name: array.finish() for name, array in self._named_rewards.items()},
            answers=tuple(self._answers),
            sources=tuple(self._sources),
            records=tuple(self._records) if any(self._records) else (),
        )


class _GrowingArray:
    """An array with room at its end."""

    def __init__(self, like: NDArray) -> None:
        """Of items like those of an array; there are none yet."""
        self._array = np.empty((_FIRST_ITEMS, *like.shape[1:]), dtype=like.dtype)
        self.size = 0
        """Items that are there."""

    def extend(self, values: NDArray) -> None:
        self._more(len(values))[:] = values

    def fill(self, count: int, value: float) -> None:
        self._more(count)[:] = value

    def _more(self, count: int) -> NDArray:
        """Room for so many more items."""
        start, self.size = self.size, self.size + count
        if self.size > len(self._array):
            # The system moves the pages of a large array and copies nothing. No view of it exists.
            self._resize(max(self.size, len(self._array) * 5 // 4))
        return self._array[start : self.size]

    def finish(self) -> NDArray:
        self._resize(self.size)
        self._array.flags.writeable = False
        return self._array

    def _resize(self, size: int) -> None:
        self._array.resize((size, *self._array.shape[1:]), refcheck=False)
