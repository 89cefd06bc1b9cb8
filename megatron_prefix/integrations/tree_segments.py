"""Rows in the words of `TreePackedSeqParams`, which Megatron-LM #7387 proposes, and in ours.

The proposal describes a row by segments in depth-first order. A token sees its own segment up to
itself, and all of the segments above. So does a token here, and rows differ in two ways only. A
`PackedLayout` has its segments level after level. And a segment here begins with the token that its
first label follows, the same for all children of a segment; there that token is the last of the
segment above, once. Both are trees of rows, and either can be described in the other's words.

The field names are those that the proposal's own test gives to the class, in September 2026; no
release of Megatron-Core has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_prefix.layout import PackedLayout, PrefixTree, pack


@dataclass(frozen=True, kw_only=True)
class TreeSegments:
    """The segments of a row, parents before their children, without gaps between them."""

    starts: tuple[int, ...]
    """First token of each in the row."""
    lengths: tuple[int, ...]
    """Tokens of each, at least one."""
    parents: tuple[int, ...]
    """The segment above each, -1 where there is none."""
    depths: tuple[int, ...]
    """Tokens of all segments above each: the position of its first token."""

    def __post_init__(self) -> None:
        segments = zip(self.starts, self.lengths, self.parents, self.depths, strict=True)
        end = 0
        for segment, (start, length, parent, depth) in enumerate(segments):
            above = 0 if parent < 0 else self.depths[parent] + self.lengths[parent]
            if start != end or length < 1 or not -1 <= parent < segment or depth != above:
                raise ValueError(
                    f"segment {segment} has start {start}, length {length}, parent {parent} and "
                    f"depth {depth}: segments follow one another from 0, with at least one token "
                    f"each, behind their parent, and as deep as it ends ({above})"
                )
            end = start + length

    @classmethod
    def of_params(cls, params: Any) -> TreeSegments:
        """Those of a `TreePackedSeqParams`, or of anything with its fields.

        Raises:
            ValueError: segments that are no row's, or a row that is cut for context parallelism.
        """
        found = cls(
            starts=tuple(params.tree_segment_starts),
            lengths=tuple(params.tree_segment_lengths),
            parents=tuple(params.tree_segment_parents),
            depths=tuple(params.tree_segment_depths),
        )
        local = params.tree_cp_local_token_count
        if local != found.num_tokens:
            raise ValueError(
                f"tree_cp_local_token_count={local} of {found.num_tokens} tokens: a row that is "
                "cut for context parallelism cannot be taken over. Give all of it"
            )
        return found

    @classmethod
    def of_layout(cls, layout: PackedLayout) -> tuple[TreeSegments, np.ndarray]:
        """A layout's segments, and how its row is brought into their order.

        Returns:
            The segments, padding as one of its own, and [T] int64: which token of the layout's row
            each of the described row is.
        """
        children: dict[int, list[int]] = {}
        for index, segment in enumerate(layout.segments):
            children.setdefault(segment.parent, []).append(index)
        places: list[range] = []
        parents: list[int] = []
        depths: list[int] = []
        number = {-1: -1}
        waiting = children.get(-1, [])[::-1]
        while waiting:
            index = waiting.pop()
            segment = layout.segments[index]
            number[index] = len(places)
            places.append(range(segment.start, segment.start + segment.length))
            parents.append(number[segment.parent])
            depths.append(segment.first_position)
            waiting += children.get(index, [])[::-1]
        if layout.num_padding:
            places.append(range(layout.num_tokens - layout.num_padding, layout.num_tokens))
            parents.append(-1)
            depths.append(0)
        lengths = [len(place) for place in places]
        found = cls(
            starts=tuple(np.cumsum([0, *lengths])[:-1].tolist()),
            lengths=tuple(lengths),
            parents=tuple(parents),
            depths=tuple(depths),
        )
        return found, np.array([row for place in places for row in place], dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return sum(self.lengths)

    def layout(self) -> tuple[PackedLayout, np.ndarray]:
        """The layout that our layers run for this row.

        Of the layout only attention and positions are this row's: input ids and labels are the
        framework's own.

        Returns:
            The layout, and [T] int64: which token of this row each of the layout's is.
        """
        inner = set(self.parents)
        paths: list[tuple[int, ...]] = []
        for segment, parent in enumerate(self.parents):
            paths.append((*(paths[parent] if parent >= 0 else ()), segment))
        tree = PrefixTree(
            parents=self.parents,
            # A root has one position less than tokens.
            tokens=tuple(
                np.zeros(length + (parent < 0), dtype=np.int64)
                for length, parent in zip(self.lengths, self.parents, strict=True)
            ),
            sequences=tuple(path for path in paths if path[-1] not in inner),
        )
        layout = pack(tree)
        order = [
            np.arange(self.starts[segment.node], self.starts[segment.node] + segment.length)
            for segment in layout.segments
        ]
        return layout, np.concatenate(order)

    def fields(self, device: torch.device | str) -> dict[str, Any]:
        """Keyword arguments of a `TreePackedSeqParams` whose row is on one rank.

        Its `tree_query_runs` are tuples, in the order of the fields of the proposal's
        `TreeQueryRun`: segment, first token, the one behind the last, and [n] the tokens.
        """
        runs = [
            (segment, start, start + length, torch.arange(start, start + length, device=device))
            for segment, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True))
        ]
        positions = [
            torch.arange(depth, depth + length, device=device)
            for depth, length in zip(self.depths, self.lengths, strict=True)
        ]
        return {
            "tree_segment_starts": self.starts,
            "tree_segment_lengths": self.lengths,
            "tree_segment_parents": self.parents,
            "tree_segment_depths": self.depths,
            "tree_local_position_ids": torch.cat(positions),
            "tree_cp_gather_inverse": torch.arange(self.num_tokens, device=device),
            "tree_query_runs": tuple(runs),
            "tree_cp_local_token_count": self.num_tokens,
        }
