"""How a run packs, from its configuration."""

from __future__ import annotations

from megatron_prefix.config import ParallelConfig, TrainingConfig
from megatron_prefix.config.bounds import refuse
from megatron_prefix.config.training import faults_of_layout
from megatron_prefix.layout import ModelShape, Packing


def packing_of_run(
    training: TrainingConfig,
    parallel: ParallelConfig,
    *,
    model_shape: ModelShape,
    data_parallel_size: int,
) -> Packing:
    """The packing of a run with these sections on so many data-parallel ranks.

    Raises:
        ConfigError: the sections do not go together.
    """
    refuse(faults_of_layout(training, parallel))
    return Packing(
        token_budget=training.token_budget,
        data_parallel_size=data_parallel_size,
        model_shape=model_shape,
        pad_to_multiple=parallel.pad_to_multiple,
        microbatch_multiple=parallel.microbatch_multiple,
        allow_split=training.allow_split,
        sharing=training.sharing,
        trim_last_layer=training.trim_last_layer and not model_shape.whole_last_layer,
        share_only_where_it_pays=training.share_only_where_it_pays,
        share_across_microbatches=training.share_across_microbatches,
    )
