"""From token lists to packed rows: the prefix tree, the microbatch plan, the layout of a row.

Plain Python and NumPy. Data flows one way: `PrefixTree` -> `plan_microbatches` ->
`microbatch_tree` -> `pack`, and under context parallelism -> `shard_layout` -> `RankStages`.
"""

from megatron_prefix.layout.cost import ModelShape, activation_tokens, trained_labels
from megatron_prefix.layout.dispatch import shard_layout
from megatron_prefix.layout.packing import AttentionStage, PackedLayout, Segment, pack
from megatron_prefix.layout.planner import (
    GroupSlice,
    MicrobatchPlan,
    microbatch_tree,
    plan_microbatches,
)
from megatron_prefix.layout.shard_stages import GatheredStages, RankStages
from megatron_prefix.layout.sharding import ContextShards
from megatron_prefix.layout.sharing import share_where_it_pays
from megatron_prefix.layout.step_packing import Packing
from megatron_prefix.layout.tree import PrefixTree
from megatron_prefix.layout.trimming import rows_to_keep, trim_stages

__all__ = [
    "AttentionStage",
    "ContextShards",
    "GatheredStages",
    "GroupSlice",
    "MicrobatchPlan",
    "ModelShape",
    "PackedLayout",
    "Packing",
    "PrefixTree",
    "RankStages",
    "Segment",
    "activation_tokens",
    "microbatch_tree",
    "pack",
    "plan_microbatches",
    "rows_to_keep",
    "shard_layout",
    "share_where_it_pays",
    "trained_labels",
    "trim_stages",
]
