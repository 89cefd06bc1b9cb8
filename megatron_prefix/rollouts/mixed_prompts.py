"""Prompts of several data sets, mixed by ratios.

After n prompts each data set has given its share of them, to within one prompt: the next one is of
the set that is furthest behind. Each set goes through its own epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_prefix.rollouts.prompts import Prompt, PromptSource
from megatron_prefix.rollouts.stream import position_kept


class MixedPrompts:
    """A `PromptSource` of others, which are without end."""

    def __init__(self, sources: Sequence[PromptSource], ratios: Sequence[float]) -> None:
        """Nothing is read yet.

        Args:
            sources: of the prompts.
            ratios: of each, above 0.
        """
        self._sources = sources
        self._shares = [ratio / sum(ratios) for ratio in ratios]
        self._taken = [0] * len(sources)

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts.

        Raises:
            ValueError: a record that is wrong; nothing is taken then.
        """
        with position_kept(self):
            order = [self._next() for _ in range(count)]
            taken = [
                iter(source.take(order.count(index)) if index in order else ())
                for index, source in enumerate(self._sources)
            ]
        return [next(taken[index]) for index in order]

    def _next(self) -> int:
        """The data set that is furthest behind its share."""
        total = sum(self._taken) + 1
        behind = [s * total - n for s, n in zip(self._shares, self._taken, strict=True)]
        index = behind.index(max(behind))
        self._taken[index] += 1
        return index

    def state_dict(self) -> dict[str, Any]:
        """How many were taken of each, and where each stands."""
        return {
            "shares": self._shares,
            "taken": list(self._taken),
            "sources": [source.state_dict() for source in self._sources],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; other ratios hold from there on.

        Raises:
            ValueError: there are more or fewer data sets, or one is another.
        """
        if "sources" not in state or len(state["sources"]) != len(self._sources):
            raise ValueError(
                f"rollouts.ratios: the saved position is not one in {len(self._sources)} data "
                "sets; set paths and ratios back, or start a new run"
            )
        for source, saved in zip(self._sources, state["sources"], strict=True):
            source.load_state_dict(saved)
        same = state["shares"] == self._shares
        self._taken = list(state["taken"]) if same else [0] * len(self._sources)

    def close(self) -> None:
        """Close what is open."""
        for source in self._sources:
            source.close()
