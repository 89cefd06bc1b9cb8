"""Draw how a microbatch is packed: its segments in the row, and who attends to whom.

    python tools/show_layout.py --shapes shapes.yaml --out layout.png
    python tools/show_layout.py --shapes shapes.yaml --cp 4 --out ranks.png

shapes.yaml is a list of groups, {prefix: int, responses: [int, ...]}; `system: int` in front is a
beginning that groups share. Without --cp: left the ungrouped run (each prompt repeated), right the
grouped one; the shaded cells are the attention stages. With --cp: above the tree, below who attends
to whom, every token in the colour of the context-parallel rank that holds it, and the keys that
have to travel.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from tool_help import HelpFormatter

from megatron_prefix.layout import (
    ContextShards,
    PackedLayout,
    PrefixTree,
    RankStages,
    pack,
    shard_layout,
)
from megatron_prefix.packages import MissingPackageError, needed_by
from megatron_prefix.planning.shapes import read_shapes, tree_of_shape

EXAMPLE = [{"prefix": 12, "responses": [5, 7, 4]}, {"prefix": 6, "responses": [3, 5]}]
EXAMPLE_OF_RANKS = [{"prefix": 25, "responses": [9, 7, 8, 6]}, {"prefix": 9, "responses": [4, 5]}]
SELF_STAGE, CROSS_STAGE = 1, 2


def trees(shapes: list[dict[str, Any]]) -> tuple[PrefixTree, PrefixTree]:
    """The groups with their prompts repeated, and with their prompts shared."""
    groups = PrefixTree.concat(tree_of_shape(shape, index) for index, shape in enumerate(shapes))
    sequences = [groups.sequence_tokens(i) for i in range(groups.num_sequences)]
    repeated = PrefixTree.concat(PrefixTree.from_sequences([tokens]) for tokens in sequences)
    has_turns = any(not isinstance(r, int) for s in shapes for r in s["responses"])
    if has_turns or any("system" in shape for shape in shapes):
        return repeated, PrefixTree.from_sequences(sequences)
    return repeated, groups


def mask(layout: PackedLayout) -> np.ndarray:
    """[T, T]: the kind of stage in which each query (row) sees each key (column), 0 for none."""
    seen = np.zeros((layout.num_tokens, layout.num_tokens), dtype=np.int8)
    for stage in layout.stages:
        q_bounds, k_bounds = stage.queries.start + stage.on.cu_q, stage.keys.start + stage.on.cu_k
        for (q0, q1), (k0, k1) in zip(pairwise(q_bounds), pairwise(k_bounds), strict=True):
            block = np.ones((q1 - q0, k1 - k0), dtype=np.int8)
            if stage.on.causal:
                seen[q0:q1, k0:k1] = np.tril(block) * SELF_STAGE
            else:
                seen[q0:q1, k0:k1] = block * CROSS_STAGE
    return seen


def draw(shapes: list[dict[str, Any]], path: Path) -> None:
    """Write the picture as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    colours = ListedColormap(["#f4f4f4", "#2b6cb0", "#dd8a2e"])
    layouts = [pack(tree) for tree in trees(shapes)]
    longest = max(layout.num_tokens for layout in layouts)
    figure, axes = plt.subplots(
        1,
        2,
        figsize=(12, 6.4),
        layout="constrained",
        # As wide as the rows are long; a short one still has the width of its title.
        width_ratios=[max(layout.num_tokens, longest // 2) for layout in layouts],
    )
    for axis, layout, title in zip(axes, layouts, ("ungrouped", "grouped"), strict=True):
        seen = mask(layout)
        axis.imshow(seen, cmap=colours, vmin=0, vmax=2, interpolation="nearest")
        _label_segments(axis, layout, colour="white")
        axis.set_title(
            f"{title}\n{layout.num_tokens:,} tokens\n{np.count_nonzero(seen):,} attention pairs"
        )
    axes[0].set_ylabel("query")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours(i)) for i in (SELF_STAGE, CROSS_STAGE)]
    figure.legend(
        handles,
        ["self stage: a segment sees itself, causally", "cross stage: a response sees its prefix"],
        loc="outside lower center",
        ncols=2,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_ranks(shapes: list[dict[str, Any]], num_ranks: int, path: Path) -> None:
    """Write the picture of a microbatch on context-parallel ranks as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgb

    layout = pack(trees(shapes)[1], pad_to_multiple=num_ranks)
    shards = shard_layout(layout, num_ranks)
    ranks = rank_of_token(shards)
    palette = plt.get_cmap("tab10" if num_ranks <= 10 else "turbo", max(num_ranks, 10))
    colours = np.array([to_rgb(palette(r)) for r in range(num_ranks)] + [to_rgb("#bbbbbb")])

    depth = len(layout.level_starts) - 1
    figure, (tree_axis, axis) = plt.subplots(
        2, 1, figsize=(9, 8.5 + 0.6 * depth), layout="constrained", height_ratios=[depth, 10]
    )
    _draw_tree(tree_axis, shards, ranks, colours)

    seen = mask(layout) > 0
    cells = np.ones((*seen.shape, 3))
    cells[seen] = colours[np.broadcast_to(ranks[:, None], seen.shape)[seen]]
    # What a query sees of another rank's keys has come over the network.
    remote = seen & (ranks[:, None] != ranks[None, :])
    cells[remote] = 0.45 * cells[remote] + 0.55
    axis.imshow(cells, interpolation="nearest")
    _label_segments(axis, layout, colour="#888888")
    axis.set_ylabel("query, in the colour of its rank; pale: the key is another rank's")
    axis.set_title(
        f"{layout.num_tokens} tokens on {num_ranks} ranks, {shards.tokens_per_rank} each; keys and "
        f"values of {int(shards.shard_tokens.sum())} tokens travel"
    )
    work = shards.attention_pairs
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[r]) for r in range(num_ranks)]
    labels = [f"rank {r}: {work[r]} pairs" for r in range(num_ranks)]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(num_ranks, 4))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _label_segments(axis: Any, layout: PackedLayout, *, colour: str) -> None:
    """Borders and names of the segments along both axes."""
    for segment in layout.segments[1:]:
        axis.axhline(segment.start - 0.5, color=colour, linewidth=0.75)
        axis.axvline(segment.start - 0.5, color=colour, linewidth=0.75)
    names = [_name(layout, i) for i in range(len(layout.segments))]
    middles = [segment.start + segment.length / 2 - 0.5 for segment in layout.segments]
    axis.set_xticks(middles, names, rotation=60, fontsize=8)
    axis.set_yticks(middles, names, fontsize=8)
    axis.set_xlabel("key")


def rank_of_token(shards: ContextShards) -> np.ndarray:
    """[T]: the rank that holds each token; the number of ranks for padding."""
    ranks = np.full(shards.layout.num_tokens, shards.num_ranks)
    for rank in range(shards.num_ranks):
        rows = RankStages(shards, rank).rows()
        ranks[rows[rows >= 0]] = rank
    return ranks


def _draw_tree(axis: Any, shards: ContextShards, ranks: np.ndarray, colours: np.ndarray) -> None:
    """Every segment as a bar of its tokens, children below their parent."""
    segments = shards.layout.segments
    gap = max(1, shards.layout.num_tokens // 60)
    children: dict[int, list[int]] = {}
    for index, segment in enumerate(segments):
        children.setdefault(segment.parent, []).append(index)
    widths: dict[int, int] = {}
    for index in reversed(range(len(segments))):
        below = [widths[child] + gap for child in children.get(index, ())]
        widths[index] = max(segments[index].length, sum(below) - gap)
    left: dict[int, int] = {-1: 0}
    used: dict[int, int] = {}
    for index, segment in enumerate(segments):
        parent = segment.parent
        left[index] = used.get(parent, left[parent])
        used[parent] = left[index] + widths[index] + gap
        run = slice(segment.start, segment.start + segment.length)
        axis.bar(
            left[index] + np.arange(segment.length),
            0.55,
            width=1.0,
            bottom=-segment.level - 0.55,
            align="edge",
            color=colours[ranks[run]],
        )
        axis.text(left[index], -segment.level + 0.04, _name(shards.layout, index), fontsize=8)
        if parent >= 0:
            end = left[parent] + min(segments[parent].length, left[index] - left[parent])
            axis.plot([end, left[index]], [-segment.level + 0.45, -segment.level], color="#888888")
    axis.set_xlim(-1, max(left[i] + s.length for i, s in enumerate(segments)) + 1)
    axis.set_axis_off()


def _name(layout: PackedLayout, index: int) -> str:
    """P1, P2, ... for roots with children, R1.1, ... for responses below them, S1, ... for the
    rest; segments in between carry the numbers of their path, P1.2."""
    segments = layout.segments
    path = [index]
    while segments[path[0]].parent >= 0:
        path.insert(0, segments[path[0]].parent)
    numbers = []
    for at in path:
        siblings = [i for i, s in enumerate(segments) if s.parent == segments[at].parent]
        numbers.append(str(siblings.index(at) + 1))
    has_children = any(s.parent == index for s in segments)
    letter = "P" if has_children else "S" if len(path) == 1 else "R"
    return letter + ".".join(numbers)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--shapes",
        type=Path,
        help="YAML: [{prefix: int, responses: [int]}], see tools/README.md; left out: two small "
        "groups",
    )
    parser.add_argument("--cp", type=int, default=1, help="context-parallel ranks")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/layout.png"), help="the picture to write"
    )
    args = parser.parse_args()
    if args.cp < 1:
        parser.error(f"--cp: {args.cp} must be at least 1")
    shapes = EXAMPLE if args.cp == 1 else EXAMPLE_OF_RANKS
    if args.shapes is not None:
        try:
            shapes = read_shapes(args.shapes)
        except (ValueError, OSError) as error:
            print(f"show_layout: {error}", file=sys.stderr)
            return 2
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with needed_by("show_layout", extra="train"):
            if args.cp == 1:
                draw(shapes, args.out)
            else:
                draw_ranks(shapes, args.cp, args.out)
    except (MissingPackageError, OSError) as error:
        print(f"show_layout: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
