"""Which sequences run in which microbatch, on which data-parallel rank.

Invariants of a plan:

- every sequence of every group is in exactly one microbatch;
- a microbatch, packed and padded, keeps to the token budget; where it is a series (see
  `GroupSlice.parts`), each of its parts with the root does;
- a microbatch holds at most one slice of a group, and nothing beside a series;
- every rank has the same number of microbatches, a multiple of `microbatch_multiple`, and no more
  than first-fit decreasing needs for the budget;
- with series allowed, the busiest rank has no more work than without them;
- a microbatch is empty only if there are not enough branches to fill all slots: with splitting
  allowed, fewer root-to-leaf paths (for GRPO groups: responses) than slots; without, fewer groups.
  (A slot is one microbatch of one rank.)
- the plan is a function of the arguments alone; all counts are exact, so every rank finds the same.

A group is split where it must be: when it is over the budget, or when there are fewer groups
than slots. In the second case some rank or pipeline step would have nothing to do while others run
whole groups, so the costliest groups are divided until the slots are filled. A group that fits is
never split merely to even out the rest.

The balance, see `balancing`: ranks are even in sum, as the gradient reduction wants it, and also at
each step, as the all-to-all of experts wants it; and the row that needs most memory is the first to
run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_prefix.layout.balancing import balanced_ranks
from megatron_prefix.layout.cost import ModelShape
from megatron_prefix.layout.division import (
    Division,
    Series,
    divide_to_fill,
    divide_to_fit,
    microbatches_for,
)
from megatron_prefix.layout.padding import padded_tokens
from megatron_prefix.layout.splitting import Piece, SplittableGroup
from megatron_prefix.layout.tree import PrefixTree
from megatron_prefix.layout.tree_cost import node_flops
from megatron_prefix.layout.tree_shape import TreeShape

SERIES_SIZES = (1.5, 1.0, 0.5)
"""How long series may be, in fair parts of a rank, that are tried: few long ones run fewest
prefixes, many short ones balance better."""


@dataclass(frozen=True, kw_only=True)
class GroupSlice:
    """Sequences of one group that run together."""

    group: int
    sequences: tuple[int, ...]
    """Ascending indices into the group's tree."""
    parts: tuple[tuple[int, ...], ...] = ()
    """Where they are more than one row, the sequences of each: the group's root runs first, then
    each part, which attends to the root's keys and values."""


@dataclass(frozen=True, kw_only=True)
class MicrobatchPlan:
    """The microbatches of one optimizer step, or of one pass over a batch."""

    microbatches: tuple[tuple[tuple[GroupSlice, ...], ...], ...]
    """[data-parallel rank][microbatch][slice], slices by group; a microbatch may be empty."""

    flops: np.ndarray = field(compare=False)
    """[data-parallel rank, microbatch] float64: forward FLOPs, without padding."""
    packed_tokens: np.ndarray = field(compare=False)
    """[data-parallel rank, microbatch] int64: tokens of each packed row, padding included."""

    @property
    def num_microbatches(self) -> int:
        """Microbatches of each rank."""
        return len(self.microbatches[0])

    def fingerprint(self) -> str:
        """A hash that is equal on two ranks if and only if their plans are."""
        microbatches = [slices for rank in self.microbatches for slices in rank]
        slices = [piece for members in microbatches for piece in members]
        content = [
            [len(self.microbatches), *(len(members) for members in microbatches)],
            [n for p in slices for n in (p.group, len(p.sequences), len(p.parts))],
            [i for piece in slices for i in piece.sequences],
            [n for p in slices for part in p.parts for n in (len(part), *part)],
        ]
        digest = hashlib.sha256()
        for numbers in content:
            digest.update(len(numbers).to_bytes(8, "little"))
            digest.update(np.array(numbers, dtype="<i8").tobytes())
        return digest.hexdigest()


def rows_of(slices: Sequence[GroupSlice]) -> list[tuple[GroupSlice, ...]]:
    """The slices of each row with responses: one row, or each of a series (without its root)."""
    if not any(part.parts for part in slices):
        return [tuple(slices)]
    (series,) = slices
    return [(GroupSlice(group=series.group, sequences=part),) for part in series.parts]


def microbatch_tree(
    trees: Sequence[PrefixTree] | Mapping[int, PrefixTree], slices: Sequence[GroupSlice]
) -> PrefixTree:
    """The tree to pack for one microbatch: its slices' sequences in order, chains merged.

    Args:
        trees: by group, at least those of the slices.
        slices: of the microbatch.
    """
    return PrefixTree.concat(trees[s.group].subset(s.sequences) for s in slices).merge_chains()


def plan_microbatches(
    trees: Sequence[TreeShape],
    *,
    token_budget: int,
    data_parallel_size: int,
    cost: ModelShape,
    allow_split: bool = True,
    pad_to_multiple: int = 1,
    microbatch_multiple: int = 1,
    names: Sequence[str] | None = None,
    labels: Sequence[np.ndarray] | None = None,
    spans: Sequence[np.ndarray] | None = None,
    trim_last_layer: bool = False,
    share_across_microbatches: bool = False,
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
        spans: [nodes] for each group, as in `tree_cost.node_flops`; None: as many as labels.
        trim_last_layer: whether the last layer runs only what is scored, as in
            `tree_cost.node_flops`.
        share_across_microbatches: whether pieces of a group may follow one another on a rank and
            run the root that they share once; it is done where it makes the busiest rank less busy.

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
    assert spans is None or len(spans) == len(trees)
    groups = [
        SplittableGroup(
            i,
            tree,
            node_flops(
                cost,
                tree,
                labels=None if labels is None else labels[i],
                spans=None if spans is None else spans[i],
                trim_last_layer=trim_last_layer,
            ),
        )
        for i, tree in enumerate(trees)
    ]
    divided = divide_to_fit(groups, capacity, data_parallel_size, microbatch_multiple)
    divisions = [Division(groups, divided, capacity)]
    if share_across_microbatches and any(len(pieces) > 1 for pieces in divided):
        fair = sum(group.cost for group in groups) / data_parallel_size
        divisions += [Series(groups, divided, capacity, part * fair) for part in SERIES_SIZES]
    plans = [
        _plan(division, allow_split, data_parallel_size, microbatch_multiple, pad_to_multiple)
        for division in divisions
    ]
    return min(plans, key=lambda plan: plan.flops.sum(axis=1).max())


def _plan(
    division: Division,
    allow_split: bool,
    data_parallel_size: int,
    microbatch_multiple: int,
    pad_to_multiple: int,
) -> MicrobatchPlan:
    """The plan of groups that are divided in this way, and further where slots would be empty."""
    divided = division.pieces
    num_microbatches = microbatches_for(
        divided, division.capacity, data_parallel_size * microbatch_multiple, microbatch_multiple
    )
    if allow_split:
        divided = divide_to_fill(division, data_parallel_size * num_microbatches)
    ranks = balanced_ranks(
        [piece for parts in divided for piece in parts],
        division.groups,
        num_ranks=data_parallel_size,
        num_microbatches=num_microbatches,
        capacity=division.capacity,
    )
    return MicrobatchPlan(
        microbatches=tuple(
            tuple(tuple(_slice_of(piece) for piece in members) for members in rank)
            for rank in ranks
        ),
        flops=np.array(
            [[float(sum(p.cost for p in members)) for members in rank] for rank in ranks]
        ),
        packed_tokens=np.array(
            [
                [_tokens_of(members, division.groups, pad_to_multiple) for members in rank]
                for rank in ranks
            ],
            dtype=np.int64,
        ),
    )


def _slice_of(piece: Piece) -> GroupSlice:
    parts = tuple(part.sequences for part in piece.parts)
    return GroupSlice(group=piece.group, sequences=piece.sequences, parts=parts)


def _tokens_of(
    pieces: Sequence[Piece], groups: Sequence[SplittableGroup], pad_to_multiple: int
) -> int:
    """Tokens of a microbatch's rows: one row, or the root's and one for each part."""
    if not any(piece.parts for piece in pieces):
        return padded_tokens(sum(piece.tokens for piece in pieces), pad_to_multiple)
    (piece,) = pieces
    root = groups[piece.group].root_tokens
    rows = [root, *(part.tokens - root for part in piece.parts)]
    return sum(padded_tokens(tokens, pad_to_multiple) for tokens in rows)


def _check_group(
    tree: TreeShape,
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
