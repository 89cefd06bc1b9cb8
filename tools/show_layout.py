"""Draw how a microbatch is packed: its segments in the row, and who attends to whom.

    python tools/show_layout.py --shapes shapes.yaml --out layout.png

shapes.yaml is a list of groups, {prefix: int, responses: [int, ...]}. Left the ungrouped run (each
prompt repeated), right the grouped one; the shaded cells are the attention stages.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_prefix.layout import PackedLayout, PrefixTree, pack
from megatron_prefix.shapes import read_shapes

EXAMPLE = [{"prefix": 12, "responses": [5, 7, 4]}, {"prefix": 6, "responses": [3, 5]}]
SELF_STAGE, CROSS_STAGE = 1, 2


def trees(shapes: list[dict[str, Any]]) -> tuple[PrefixTree, PrefixTree]:
    """The groups with their prompts repeated, and with their prompts shared."""
    groups = [
        (
            np.zeros(s["prefix"], dtype=np.int64),
            [np.ones(n, dtype=np.int64) for n in s["responses"]],
        )
        for s in shapes
    ]
    repeated = PrefixTree.concat(
        [
            PrefixTree.from_sequences([np.concatenate([prompt, response])])
            for prompt, responses in groups
            for response in responses
        ]
    )
    return repeated, PrefixTree.from_groups(groups)


def mask(layout: PackedLayout) -> np.ndarray:
    """[T, T]: the kind of stage in which each query (row) sees each key (column), 0 for none."""
    seen = np.zeros((layout.num_tokens, layout.num_tokens), dtype=np.int8)
    for stage in layout.stages:
        for i in range(len(stage.cu_q) - 1):
            q0, q1 = stage.q_start + stage.cu_q[i], stage.q_start + stage.cu_q[i + 1]
            k0, k1 = stage.k_start + stage.cu_k[i], stage.k_start + stage.cu_k[i + 1]
            block = np.ones((q1 - q0, k1 - k0), dtype=np.int8)
            if stage.causal:
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
    figure, axes = plt.subplots(
        1,
        2,
        figsize=(11, 5.8),
        layout="constrained",
        width_ratios=[layout.num_tokens for layout in layouts],
    )
    for axis, layout, title in zip(axes, layouts, ("ungrouped", "grouped"), strict=True):
        seen = mask(layout)
        axis.imshow(seen, cmap=colours, vmin=0, vmax=2, interpolation="nearest")
        for segment in layout.segments[1:]:
            axis.axhline(segment.start - 0.5, color="white", linewidth=1)
            axis.axvline(segment.start - 0.5, color="white", linewidth=1)
        names = [_name(layout, i) for i in range(len(layout.segments))]
        middles = [segment.start + segment.length / 2 - 0.5 for segment in layout.segments]
        axis.set_xticks(middles, names, rotation=60, fontsize=8)
        axis.set_yticks(middles, names, fontsize=8)
        axis.set_title(
            f"{title}: {layout.num_tokens} tokens, {np.count_nonzero(seen)} attention pairs"
        )
        axis.set_xlabel("key")
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


def _name(layout: PackedLayout, index: int) -> str:
    """P1, P2, ... for roots with children, R1.1, ... for their responses, S1, ... for the rest."""
    segments = layout.segments
    roots = [i for i, s in enumerate(segments) if s.parent < 0]
    parent = segments[index].parent
    if parent < 0:
        has_children = any(s.parent == index for s in segments)
        return f"{'P' if has_children else 'S'}{roots.index(index) + 1}"
    siblings = [i for i, s in enumerate(segments) if s.parent == parent]
    return f"R{roots.index(parent) + 1}.{siblings.index(index) + 1}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=Path, help="YAML: [{prefix: int, responses: [int]}]")
    parser.add_argument("--out", type=Path, default=Path("layout.png"))
    args = parser.parse_args()
    shapes = EXAMPLE
    if args.shapes is not None:
        try:
            shapes = read_shapes(args.shapes)
        except (ValueError, OSError) as error:
            print(f"show_layout: {error}", file=sys.stderr)
            return 2
    draw(shapes, args.out)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
