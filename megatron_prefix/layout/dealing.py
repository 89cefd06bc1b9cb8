"""Groups dealt to data-parallel ranks by a trainer that gives each rank as many samples.

A sample is a prompt with a response, as other trainers have it. Our own trainer deals microbatches
instead, see `planner`.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence


def order_by_groups(
    groups: Sequence[Hashable],
    prompt_lengths: Sequence[int],
    lengths: Sequence[int],
    *,
    num_ranks: int,
) -> list[int]:
    """The samples in an order whose equal parts are the ranks'.

    Groups go, the largest first, to the rank with fewest packed tokens that has room. Where no
    rank has room for a whole group, it is split over as few as it can.

    Args:
        groups: of each sample.
        prompt_lengths: of each sample.
        lengths: tokens of each sample, prompt and response.
        num_ranks: divides the number of samples.

    Returns:
        [samples] indices; samples of a group follow one another on a rank.
    """
    members: dict[Hashable, list[int]] = {}
    for sample, group in enumerate(groups):
        members.setdefault(group, []).append(sample)
    room = [len(groups) // num_ranks] * num_ranks
    parts: list[list[int]] = [[] for _ in range(num_ranks)]
    tokens = [0] * num_ranks

    def packed(samples: Sequence[int]) -> int:
        prompt = prompt_lengths[samples[0]]
        return prompt + sum(lengths[i] - prompt_lengths[i] for i in samples)

    waiting = [(-len(m), -packed(m), i, m) for i, m in enumerate(members.values())]
    heapq.heapify(waiting)
    while waiting:
        samples = heapq.heappop(waiting)[-1]
        having_room = [rank for rank in range(num_ranks) if room[rank] >= len(samples)]
        if having_room:
            rank = min(having_room, key=lambda rank: (tokens[rank], rank))
        else:
            rank = max(range(num_ranks), key=lambda rank: (room[rank], -rank))
            rest = samples[room[rank] :]
            samples = samples[: room[rank]]
            heapq.heappush(waiting, (-len(rest), -packed(rest), rest[0], rest))
        parts[rank] += samples
        room[rank] -= len(samples)
        tokens[rank] += packed(samples)
    return [sample for part in parts for sample in part]
