"""From token lists to packed rows: the prefix tree, the microbatch plan, the layout of a row.

Plain Python and NumPy. Data flows one way: `TreeShape` -> `plan_microbatches`; with the tokens of
what a rank runs, `PrefixTree` -> `microbatch_tree` -> `pack` -> `rank_row`, which under context
parallelism distributes the row (`shard_layout`) and plans this rank's part of it (`RankStages`).
"""

from megatron_prefix.layout.cost import ModelShape
from megatron_prefix.layout.dispatch import shard_layout
from megatron_prefix.layout.labels import masked_labels, trained_labels, trained_labels_of_lengths
from megatron_prefix.layout.layer_shapes import (
    DeltaNetShape,
    LatentShape,
    MambaShape,
    RecurrentShape,
)
from megatron_prefix.layout.packing import PackedLayout, Segment, pack
from megatron_prefix.layout.padding import activation_tokens
from megatron_prefix.layout.planner import (
    GroupSlice,
    MicrobatchPlan,
    microbatch_tree,
    plan_microbatches,
    rows_of,
)
from megatron_prefix.layout.rank_row import rank_row
from megatron_prefix.layout.routes import route_keys, routes_of_row
from megatron_prefix.layout.rows import (
    COMM_TYPES,
    CommType,
    ModelRow,
    RankRow,
    RowStages,
    own_values,
)
from megatron_prefix.layout.shard_stages import RankStages
from megatron_prefix.layout.sharding import ContextShards
from megatron_prefix.layout.sharing import share_where_it_pays
from megatron_prefix.layout.stages import AttentionStage, GatheredStages, Rectangles, Recurrence
from megatron_prefix.layout.step_packing import Packing
from megatron_prefix.layout.tree import PrefixTree
from megatron_prefix.layout.tree_shape import TreeShape
from megatron_prefix.layout.trimming import rows_to_keep, trim_stages

__all__ = [
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
