"""What every rank knows of a batch of rollouts, which rank 0 alone has.

Legend: G groups, R responses of all groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.layout import TreeShape
from megatron_prefix.rollouts.kinds import offsets_of


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptRoutes:
    """How far the routes of a group's prompt agree between its responses."""

    order: NDArray[np.int32]
    """[R] indices within the group: its responses so that each shares the most of the prompt with
    the one before it."""
    shared: NDArray[np.int32]
    """[R] in this order: tokens of the prompt from its beginning whose routes are those of the
    response before; 0 for the first."""

    def of_responses(self, responses: slice) -> PromptRoutes:
        """Of consecutive groups."""
        return PromptRoutes(order=self.order[responses], shared=self.shared[responses])

    def tree(self, chosen: Sequence[int], prompt_length: int, lengths: Sequence[int]) -> TreeShape:
        """Some responses of the one group that is here, each in a leaf of its own.

        Args:
            chosen: ascending indices within the group.
            prompt_length: of the group.
            lengths: of the chosen responses.
        """
        places = {index: place for place, index in enumerate(chosen)}
        order, shared, least = [], [], prompt_length
        for index, common in zip(self.order.tolist(), self.shared.tolist(), strict=True):
            least = min(least, common)
            if index in places:
                order.append(places[index])
                shared.append(least if shared else 0)
                least = prompt_length
        return TreeShape.of_common_beginnings(
            [prompt_length + int(length) for length in lengths], order, shared
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RolloutSummary:
    """What every rank knows of a batch: some twenty bytes a response, and no token."""

    prompt_lengths: NDArray[np.int32]
    """[G]"""
    group_sizes: NDArray[np.int32]
    """[G] responses of each group."""
    response_lengths: NDArray[np.int32]
    """[R]"""
    trained_lengths: NDArray[np.int32]
    """[R] tokens of each response that are trained on."""
    rewards: NDArray[np.float64]
    """[R]"""
    named_rewards: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """[R] each, as in `RolloutBatch`."""
    finished: NDArray[np.int8]
    """[R] as in `RolloutBatch`."""
    repeated: NDArray[np.bool_]
    """[R] whether an earlier response of its group has the same tokens, and whatever else their
    identity is made of: keys, positions and routes."""
    largest_advantages: NDArray[np.float64] | None
    """[R] of the advantages of each response's trained tokens, where they are given for tokens, the
    one farthest from 0; NaN: they come from the reward; None: those of all responses do."""
    sources: tuple[str, ...]
    """[G]"""
    has_old_logprobs: bool
    has_loss_mask: bool
    has_prompt_keys: bool = False
    has_keys: bool = False
    has_position_shifts: bool = False
    no_routes: NDArray | None = None
    """[0, layers with experts, topk] of the type of the batch's routes; None: it has none."""
    prompt_routes: PromptRoutes | None = None
    """None: there are no routes."""

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.sources)

    @property
    def group_offsets(self) -> NDArray[np.int64]:
        """[G + 1] into the R responses."""
        return offsets_of(self.group_sizes)

    def of_groups(self, groups: range) -> RolloutSummary:
        """The summary of consecutive groups."""
        offsets = self.group_offsets
        responses = slice(int(offsets[groups.start]), int(offsets[groups.stop]))
        chosen = slice(groups.start, groups.stop)
        largest = self.largest_advantages
        return RolloutSummary(
            prompt_lengths=self.prompt_lengths[chosen],
            group_sizes=self.group_sizes[chosen],
            response_lengths=self.response_lengths[responses],
            trained_lengths=self.trained_lengths[responses],
            rewards=self.rewards[responses],
            named_rewards={name: v[responses] for name, v in self.named_rewards.items()},
            finished=self.finished[responses],
            repeated=self.repeated[responses],
            largest_advantages=None if largest is None else largest[responses],
            sources=self.sources[chosen],
            has_old_logprobs=self.has_old_logprobs,
            has_loss_mask=self.has_loss_mask,
            has_prompt_keys=self.has_prompt_keys,
            has_keys=self.has_keys,
            has_position_shifts=self.has_position_shifts,
            no_routes=self.no_routes,
            prompt_routes=self.prompt_routes and self.prompt_routes.of_responses(responses),
        )
