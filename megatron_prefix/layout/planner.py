"""Which sequences run in which microbatch, on which data-parallel rank.

Invariants of a plan:

- every sequence of every group is in exactly one microbatch;
- a microbatch, packed and padded, keeps to the token budget;
- a microbatch holds at most one slice of a group;
- every rank has the same number of microbatches, a multiple of `microbatch_multiple`, and no more
  than first-fit decreasing needs for the budget;
- a microbatch is empty only if there are not enough branches to fill all slots: with splitting
  allowed, fewer root-to-leaf paths (for GRPO groups: responses) than slots; without, fewer groups.
  (A slot is one microbatch of one rank.)
- the plan is a function of the arguments alone; all counts are exact, so every rank finds the same.

A group is split where it must be: when it is over the budget, or when there are fewer groups
than slots. In the second case some rank or pipeline step would have nothing to do while others run
whole groups, so the costliest groups are divided until the slots are filled. A group that fits is
never split merely to even out the rest.

The balance: pieces are placed costliest first, each into the cheapest microbatch with room. The
microbatches are then dealt in rows of similar cost, one to each rank, the costliest of a row to
the rank with least work so far. So ranks are even in sum, as the gradient reduction wants it, and
also at each step, as the all-to-all of experts wants it; and the row that needs most memory is the
first to run.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_prefix.layout.cost import ModelShape
from megatron_prefix.layout.splitting import Piece, SplittableGroup
from megatron_prefix.layout.tree import PrefixTree


@dataclass(frozen=True, kw_only=True)
class GroupSlice:
    """Sequences of one group that run together."""

    group: int
    sequences: tuple[int, ...]
    """Ascending indices into the group's tree."""


@dataclass(frozen=True, kw_only=True)
class MicrobatchPlan:
    """The microbatches of one optimizer step, or of one pass over a batch."""

    microbatches: tuple[tuple[tuple[GroupSlice, ...], ...], ...]
    """[data-parallel rank][microbatch][slice], slices by group; a microbatch may be empty."""

    @property
    def num_microbatches(self) -> int:
        """Microbatches of each rank."""
        return len(self.microbatches[0])

    def fingerprint(self) -> str:
        """A hash that is equal on two ranks if and only if their plans are."""
        content = [
            [[[s.group, s.sequences] for s in slices] for slices in rank]
            for rank in self.microbatches
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def microbatch_tree(trees: Sequence[PrefixTree], slices: Sequence[GroupSlice]) -> PrefixTree:
    """The tree to pack for one microbatch: its slices' sequences in order, chains merged."""
    subsets = (trees[s.group].subset(s.sequences) for s in slices)
    return PrefixTree.concat(subsets).merge_chains()


def plan_microbatches(
    trees: Sequence[PrefixTree],
    *,
    token_budget: int,
    data_parallel_size: int,
    cost: ModelShape,
    allow_split: bool = True,
    pad_to_multiple: int = 1,
    microbatch_multiple: int = 1,
    names: Sequence[str] | None = None,
    labels: Sequence[np.ndarray] | None = None,
) -> MicrobatchPlan:
    """Assign all sequences to microbatches of at most `token_budget` tokens.

    Args:
        trees: one for each group.
        token_budget: tokens of a packed row at most, padding included.
        data_parallel_size: ranks that share the work.
        cost: what the work is measured by.
        allow_split: whether a group may be divided over microbatches.
        pad_to_multiple: as `pack` will be given it.
        microbatch_multiple: the number of microbatches of a rank is a multiple of this.
        names: of the groups, for error messages.
        labels: [nodes] for each group, scored labels of each node; None: those of
            `response_labels`.

    Raises:
        ValueError: a sequence over the token budget, a group over it with `allow_split` off, a
            group without sequences (each naming the group), or an option below 1.
    """
    for option, value in (
        ("token_budget", token_budget),
        ("data_parallel_size", data_parallel_size),
        ("pad_to_multiple", pad_to_multiple),
        ("microbatch_multiple", microbatch_multiple),
    ):
        if value < 1:
            raise ValueError(f"{option}={value} must be at least 1")
    if token_budget < pad_to_multiple:
        raise ValueError(
            f"token_budget={token_budget} is less than pad_to_multiple={pad_to_multiple}, the "
            f"shortest row there is"
        )
    assert names is None or len(names) == len(trees)
    capacity = token_budget - token_budget % pad_to_multiple
    for i, tree in enumerate(trees):
        what = f"group {i}" if names is None else f"group {i} ({names[i]})"
        _check_group(tree, what, capacity, token_budget, pad_to_multiple, allow_split)

    assert labels is None or len(labels) == len(trees)
    groups = [
        SplittableGroup(i, tree, cost, None if labels is None else labels[i])
        for i, tree in enumerate(trees)
    ]
    divided, num_microbatches = _divide_to_fit(
        groups, capacity, data_parallel_size, microbatch_multiple
    )
    num_slots = data_parallel_size * num_microbatches
    if allow_split:
        divided = _divide_to_fill(groups, divided, num_slots, capacity)
    pieces = [piece for parts in divided for piece in parts]
    bins = [
        _one_piece_per_group(members, groups)
        for members in _balanced_bins(pieces, num_slots, capacity)
    ]
    return MicrobatchPlan(
        microbatches=tuple(
            tuple(
                tuple(GroupSlice(group=p.group, sequences=p.sequences) for p in members)
                for members in rank
            )
            for rank in _deal_to_ranks(bins, data_parallel_size)
        )
    )


def _check_group(
    tree: PrefixTree,
    what: str,
    capacity: int,
    token_budget: int,
    pad_to_multiple: int,
    allow_split: bool,
) -> None:
    if tree.num_sequences == 0:
        raise ValueError(f"{what} has no sequences")
    budget = f"token_budget={token_budget}"
    if capacity < token_budget:
        budget += f" ({capacity} in multiples of pad_to_multiple={pad_to_multiple})"
    longest = int(tree.sequence_lengths.argmax())
    needed = int(tree.sequence_lengths[longest]) - 1
    if needed > capacity:
        raise ValueError(
            f"{what}: response {longest} alone, with its prefix, packs to {needed} tokens, over "
            f"{budget}; raise token_budget or leave the response out"
        )
    if tree.grouped_tokens > capacity and not allow_split:
        raise ValueError(
            f"{what} packs to {tree.grouped_tokens} tokens, over {budget}, and allow_split is "
            f"off; raise token_budget or set allow_split"
        )


def _divide_to_fit(
    groups: Sequence[SplittableGroup],
    capacity: int,
    data_parallel_size: int,
    microbatch_multiple: int,
) -> tuple[list[list[Piece]], int]:
    """The pieces of each group, the fewest that fit, and the number of microbatches of a rank."""
    filled: list[list[Piece]] = []
    even: list[list[Piece]] = []
    for group in groups:
        fits = group.tokens <= capacity
        filled.append(group.whole() if fits else group.fill(capacity))
        even.append(filled[-1] if fits else group.split_evenly(len(filled[-1]), capacity))

    def microbatches_for(divided: list[list[Piece]]) -> int:
        num_bins = len(_first_fit_decreasing([p for parts in divided for p in parts], capacity))
        per_round = data_parallel_size * microbatch_multiple
        return max(1, -(-num_bins // per_round)) * microbatch_multiple

    # Even pieces are the better balance. Full ones leave a small rest that goes in with another
    # group; they win where that saves a microbatch.
    needed_filled, needed_even = microbatches_for(filled), microbatches_for(even)
    return (even, needed_even) if needed_even <= needed_filled else (filled, needed_filled)


def _divide_to_fill(
    groups: Sequence[SplittableGroup], divided: list[list[Piece]], num_slots: int, capacity: int
) -> list[list[Piece]]:
    """Divide the costliest groups further until there is a piece for every slot."""
    missing = num_slots - sum(len(parts) for parts in divided)
    if missing <= 0:
        return divided
    counts = [len(parts) for parts in divided]
    costliest = [
        (-group.mean_cost_of_pieces(counts[group.index]), group.index)
        for group in groups
        if counts[group.index] < group.num_branches
    ]
    heapq.heapify(costliest)
    while missing and costliest:
        i = heapq.heappop(costliest)[1]
        counts[i] += 1
        missing -= 1
        if counts[i] < groups[i].num_branches:
            heapq.heappush(costliest, (-groups[i].mean_cost_of_pieces(counts[i]), i))
    return [
        parts if count == len(parts) else group.split_evenly(count, capacity)
        for group, parts, count in zip(groups, divided, counts, strict=True)
    ]


def _first_fit_decreasing(pieces: Sequence[Piece], capacity: int) -> list[list[Piece]]:
    """Few bins, by tokens: at most 11/9 of the fewest possible, plus one."""
    bins: list[list[Piece]] = []
    free = np.full(len(pieces), capacity, dtype=np.int64)
    for piece in sorted(pieces, key=lambda piece: -piece.tokens):
        # All bins that are not open yet have room, so the first with room always exists.
        first = int((free >= piece.tokens).argmax())
        if first == len(bins):
            bins.append([])
        bins[first].append(piece)
        free[first] -= piece.tokens
    return bins


def _balanced_bins(pieces: Sequence[Piece], num_bins: int, capacity: int) -> list[list[Piece]]:
    """Bins of nearly equal cost within the capacity; none is empty if there are enough pieces."""
    for key in (lambda piece: -piece.cost, lambda piece: -piece.tokens):
        bins = _cheapest_bin_first(sorted(pieces, key=key), num_bins, capacity)
        if bins is not None:
            return bins
    # Too tight for balance: keep the bins that fit, and use those that are left over.
    bins = _first_fit_decreasing(pieces, capacity)
    while len(bins) < num_bins and any(len(members) > 1 for members in bins):
        costliest = max((m for m in bins if len(m) > 1), key=_cost)
        bins.append([costliest.pop(0)])
    return bins + [[] for _ in range(num_bins - len(bins))]


def _cheapest_bin_first(
    pieces: Sequence[Piece], num_bins: int, capacity: int
) -> list[list[Piece]] | None:
    """Each piece in turn to the cheapest bin with room; None if one finds no room."""
    bins: list[list[Piece]] = [[] for _ in range(num_bins)]
    free = np.full(num_bins, capacity, dtype=np.int64)
    costs = np.zeros(num_bins, dtype=np.float64)
    for piece in pieces:
        cheapest = int(np.where(free >= piece.tokens, costs, np.inf).argmin())
        if free[cheapest] < piece.tokens:
            return None
        bins[cheapest].append(piece)
        free[cheapest] -= piece.tokens
        costs[cheapest] += piece.cost
    return bins


def _one_piece_per_group(pieces: Sequence[Piece], groups: Sequence[SplittableGroup]) -> list[Piece]:
    """In the order of the groups; pieces of one group that have met again are joined."""
    by_group: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_group.setdefault(piece.group, []).append(piece)
    return [
        parts[0] if len(parts) == 1 else groups[group].join(parts)
        for group, parts in sorted(by_group.items())
    ]


def _deal_to_ranks(bins: Sequence[list[Piece]], data_parallel_size: int) -> list[list[list[Piece]]]:
    """Rows of similar cost, costliest row first; in a row, the costliest to the least busy rank."""
    ordered = sorted(bins, key=lambda members: -_cost(members))
    ranks: list[list[list[Piece]]] = [[] for _ in range(data_parallel_size)]
    work = [0] * data_parallel_size
    for row in range(0, len(ordered), data_parallel_size):
        least_busy_first = sorted(range(data_parallel_size), key=work.__getitem__)
        for rank, members in zip(
            least_busy_first, ordered[row : row + data_parallel_size], strict=True
        ):
            ranks[rank].append(members)
            work[rank] += _cost(members)
    return ranks


def _cost(pieces: Sequence[Piece]) -> int:
    return sum(piece.cost for piece in pieces)
