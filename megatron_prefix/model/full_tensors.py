"""Whole parameters and gradients of a model that is spread over ranks, by checkpoint key.

For checks: the whole model must fit into one process's memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.model.build import ModelChunks
from megatron_prefix.model.parameter_shards import ParameterShard, parameter_shards

FullTensors = dict[str, Tensor]


def full_parameters(chunks: ModelChunks) -> FullTensors | None:
    """All parameters, whole, on rank 0; None on the other ranks. Collective."""
    return _gather([(shard, shard.data) for shard in parameter_shards(chunks)])


def full_gradients(chunks: ModelChunks) -> FullTensors | None:
    """All gradients, reduced as training does, whole, on rank 0; None elsewhere. Collective.

    Call it after the schedule has run. Under the distributed optimizer each rank holds its shard
    of the reduced gradients only; the shards are gathered into the buffers first.
    """
    _gather_gradient_shards(chunks)
    parameters = [parameter for _, parameter in chunks.named_parameters()]
    weights = [parameter.detach().clone() for parameter in parameters]
    # The sharded state dict describes where parameters lie: lend it the gradients' values.
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.main_grad)
        shards = [(shard, shard.data.clone()) for shard in parameter_shards(chunks)]
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
    return _gather(shards)


@torch.no_grad()
def load_full_parameters(chunks: ModelChunks, tensors: FullTensors) -> None:
    """Copy whole parameters into this rank's shards.

    Raises:
        ValueError: a parameter is missing or has another shape, naming it.
    """
    for shard in parameter_shards(chunks):
        if shard.key not in tensors:
            raise ValueError(f"no tensor for parameter {shard.key}")
        full = tensors[shard.key]
        if tuple(full.shape) != shard.global_shape:
            raise ValueError(
                f"parameter {shard.key}: the model needs shape {shard.global_shape}, the given "
                f"tensor has {tuple(full.shape)}"
            )
        shard.data.copy_(full[shard.index][shard.place].reshape(shard.data.shape))


def _gather(shards: list[tuple[ParameterShard, Tensor]]) -> FullTensors | None:
    mine = [
        (shard.key, shard.global_shape, (*shard.index, *shard.place), data.detach().cpu().clone())
        for shard, data in shards
    ]
    received: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, received, dst=0)
    if received is None:
        return None
    full: FullTensors = {}
    for rank_shards in received:
        for key, shape, place, data in rank_shards:
            if key not in full:
                full[key] = torch.full(shape, float("nan"), dtype=data.dtype)
            # Replicas (data parallel, norms under tensor parallel) write the same values.
            full[key][place] = data
    return full


def _gather_gradient_shards(chunks: ModelChunks) -> None:
    for wrapped in chunks.wrapped:
        if not wrapped.ddp_config.use_distributed_optimizer:
            continue
        for bucket_group in wrapped.bucket_groups + wrapped.expert_parallel_bucket_groups:
            group = bucket_group.intra_distributed_optimizer_instance_group
            for bucket in bucket_group.buckets:
                shards = list(bucket.grad_data.chunk(dist.get_world_size(group)))
                mine = shards[dist.get_rank(group)].clone()
                dist.all_gather(shards, mine, group=group)
