"""Dividing the sequences of one group into pieces that each run what they share once more.

The unit is a branch: a path from a root to a leaf, with every sequence that ends on it. Sequences
on one branch are never parted, as both pieces would then compute the whole path. Branches are taken
subtree by subtree, the larger ones first, and each goes to the piece that already holds most of
its path; on a group of depth two this is first-fit decreasing by response length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_prefix.layout.tree_shape import TreeShape


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Sequences of one group that run together."""

    group: int
    sequences: tuple[int, ...]
    """Ascending indices into the group's tree."""
    tokens: int
    """Tokens of a row that it takes: packed, without padding; all of a row for a `parts`."""
    cost: int
    """Forward FLOPs."""
    parts: tuple[Piece, ...] = ()
    """Where it is more than one row, the pieces that run one after the other and share their root;
    each of them counts it in `tokens`."""


@dataclass(frozen=True, kw_only=True)
class _Branch:
    path: tuple[int, ...]
    """Nodes from the root to the leaf."""
    sequences: tuple[int, ...]
    """Those that end on the path and on no branch before this one."""


class SplittableGroup:
    """A group, and the ways to divide it."""

    def __init__(self, index: int, tree: TreeShape, node_costs: Sequence[int]) -> None:
        """A group that can be divided.

        Args:
            index: of the group.
            tree: its sequences.
            node_costs: see `tree_cost.node_flops`.
        """
        self.index = index
        self.tree = tree
        self.tokens = tree.grouped_tokens
        self.cost = sum(node_costs)
        self._node_costs = node_costs

    @cached_property
    def num_branches(self) -> int:
        """The most pieces that the group can be divided into."""
        return self.tree.num_nodes - len({parent for parent in self.tree.parents if parent >= 0})

    def whole(self) -> list[Piece]:
        """The group as one piece."""
        sequences = tuple(range(self.tree.num_sequences))
        return [Piece(group=self.index, sequences=sequences, tokens=self.tokens, cost=self.cost)]

    def join(self, pieces: Sequence[Piece]) -> Piece:
        """Pieces of this group as one, which runs once what they share."""
        return self._piece(i for piece in pieces for i in piece.sequences)

    def fill(self, capacity: int) -> list[Piece]:
        """As few pieces of at most `capacity` tokens as first-fit decreasing finds."""
        return self._pieces(self._fill(self._branches, capacity))

    def split_evenly(self, count: int, capacity: int) -> list[Piece]:
        """`count` pieces of at most `capacity` tokens, their largest as small as can be found.

        `count` is at least the number of pieces that `fill` needs, at most `num_branches`.
        """
        return self._pieces(self._split_evenly(self._branches, count, capacity))

    @cached_property
    def root_tokens(self) -> int:
        """Packed tokens of the root that all sequences share and go on from; 0 without one."""
        one_root = self.tree.parents.count(-1) == 1
        goes_on = all(len(path) > 1 for path in self.tree.sequences)
        return self._node_tokens[0] if one_root and goes_on else 0

    def in_series(self, count: int, pieces: Sequence[Piece], capacity: int) -> list[Piece]:
        """`count` runs of these pieces, of nearly equal cost, each of which runs the root once."""
        total, start = sum(piece.cost for piece in pieces), 0
        series = []
        for index in range(count):
            stop, cost = start, 0
            # At least one piece, and one for each run that follows.
            while stop < len(pieces) - (count - index - 1):
                if stop > start and cost + pieces[stop].cost // 2 > total / (count - index):
                    break
                cost += pieces[stop].cost
                stop += 1
            series.append(self._one_after_the_other(pieces[start:stop], capacity))
            total -= cost
            start = stop
        return series

    def _one_after_the_other(self, pieces: Sequence[Piece], capacity: int) -> Piece:
        if len(pieces) == 1:
            return pieces[0]
        joined = self.join(pieces)
        return dataclasses.replace(joined, tokens=capacity, parts=tuple(pieces))

    def mean_cost_of_pieces(self, count: int) -> float:
        """FLOPs of a piece on average, if all pieces of `count` run the roots that are shared."""
        shared = {parent for parent in self.tree.parents if parent >= 0}
        roots = sum(self._node_costs[node] for node in shared if self.tree.parents[node] < 0)
        return (self.cost + (count - 1) * roots) / count

    @cached_property
    def _node_tokens(self) -> list[int]:
        return self.tree.packed_lengths.tolist()

    @cached_property
    def _branches(self) -> list[_Branch]:
        """Depth first, at every node the subtree with most tokens first."""
        parents = self.tree.parents
        below = list(self._node_tokens)
        for node in range(len(parents) - 1, -1, -1):
            if parents[node] >= 0:
                below[parents[node]] += below[node]
        children: dict[int, list[int]] = {}
        for node in sorted(range(len(parents)), key=lambda node: (-below[node], node)):
            children.setdefault(parents[node], []).append(node)
        ending: dict[int, list[int]] = {}
        for i, path in enumerate(self.tree.sequences):
            ending.setdefault(path[-1], []).append(i)

        branches: list[_Branch] = []
        passed: list[int] = []
        stack: list[tuple[int, ...]] = [(root,) for root in reversed(children[-1])]
        while stack:
            path = stack.pop()
            passed += ending.get(path[-1], ())
            if path[-1] in children:
                stack += [(*path, child) for child in reversed(children[path[-1]])]
            else:
                branches.append(_Branch(path=path, sequences=tuple(passed)))
                passed = []
        return branches

    def _fill(self, branches: Sequence[_Branch], capacity: int) -> list[list[_Branch]]:
        parts: list[list[_Branch]] = []
        nodes: list[set[int]] = []
        free: list[int] = []
        for branch in branches:
            best, least = -1, capacity + 1
            for part, held in enumerate(nodes):
                added = sum(self._node_tokens[n] for n in branch.path if n not in held)
                if added <= free[part] and added < least:
                    best, least = part, added
            if best < 0:
                best, least = len(parts), sum(self._node_tokens[n] for n in branch.path)
                parts.append([])
                nodes.append(set())
                free.append(capacity)
            assert least <= free[best], "a branch over the capacity"
            parts[best].append(branch)
            nodes[best].update(branch.path)
            free[best] -= least
        return parts

    def _split_evenly(
        self, branches: Sequence[_Branch], count: int, capacity: int
    ) -> list[list[_Branch]]:
        if count >= len(branches):
            return [[branch] for branch in branches]
        # The smallest capacity at which `count` pieces still suffice, as in MULTIFIT (Coffman,
        # Garey and Johnson 1978): bisected although first-fit is not quite monotone, so the best
        # division found on the way is kept.
        best = self._fill(branches, capacity)
        assert len(best) <= count
        low = max(sum(self._node_tokens[n] for n in branch.path) for branch in branches)
        high = max(self._tokens(part) for part in best)
        while low < high:
            middle = (low + high) // 2
            parts = self._fill(branches, middle)
            if len(parts) <= count:
                best, high = parts, max(self._tokens(part) for part in parts)
            else:
                low = middle + 1
        # Fewer pieces do where one branch outweighs several others; divide the rest all the same.
        while len(best) < count:
            largest = max((part for part in best if len(part) > 1), key=self._tokens)
            halves = self._split_evenly(largest, 2, self._tokens(largest) - 1)
            at = best.index(largest)
            best[at : at + 1] = halves
        return best

    def _tokens(self, branches: Sequence[_Branch]) -> int:
        return sum(self._node_tokens[n] for n in {n for b in branches for n in b.path})

    def _pieces(self, parts: Sequence[Sequence[_Branch]]) -> list[Piece]:
        return [self._piece(i for branch in part for i in branch.sequences) for part in parts]

    def _piece(self, sequences: Iterable[int]) -> Piece:
        ascending = tuple(sorted(sequences))
        nodes = set().union(*(self.tree.sequences[i] for i in ascending))
        return Piece(
            group=self.index,
            sequences=ascending,
            tokens=sum(self._node_tokens[n] for n in nodes),
            cost=sum(self._node_costs[n] for n in nodes),
        )
