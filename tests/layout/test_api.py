from __future__ import annotations

import ast
import sys
from pathlib import Path

from megatron_prefix import layout


def test_the_public_names_are_these():
    assert layout.__all__ == [
        "COMM_TYPES",
        "AttentionStage",
        "CommType",
        "ContextShards",
        "DeltaNetShape",
        "GatheredStages",
        "GroupSlice",
        "MicrobatchPlan",
        "ModelRow",
        "LatentShape",
        "MambaShape",
        "ModelShape",
        "PackedLayout",
        "Packing",
        "PrefixTree",
        "RankRow",
        "RankStages",
        "Rectangles",
        "Recurrence",
        "RecurrentShape",
        "RowStages",
        "Segment",
        "TreeShape",
        "activation_tokens",
        "masked_labels",
        "microbatch_tree",
        "own_values",
        "pack",
        "plan_microbatches",
        "rank_row",
        "route_keys",
        "routes_of_row",
        "rows_of",
        "rows_to_keep",
        "shard_layout",
        "share_where_it_pays",
        "trained_labels",
        "trained_labels_of_lengths",
        "trim_stages",
    ]
    assert all(hasattr(layout, name) for name in layout.__all__)


def test_planning_needs_the_standard_library_and_numpy_only():
    allowed = {*sys.stdlib_module_names, "numpy", "megatron_prefix"}
    for path in Path(layout.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name} imports {name}"
                assert not name.startswith("megatron_prefix") or name.startswith(
                    "megatron_prefix.layout"
                ), f"{path.name} imports {name}"
