"""The weights in training as a Hugging Face folder, by the conversion's table of tensors.

Every rank writes: a parameter is put together on one of the ranks that hold parts of it, copies of
the model taking turns, so that all of it is written where it is, side by side, and what a rank
holds beyond its own weights is one shard and one parameter. Ranks that do not see the folder (a
disk of another node) send their parts to one that does.
"""

from __future__ import annotations

import math
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.config import ModelConfig
from megatron_prefix.distributed.rank_results import gather, on_rank_0
from megatron_prefix.model.build import ModelChunks
from megatron_prefix.model.parameter_shards import Shape, parameter_shards
from megatron_prefix.packages import needed_by

if TYPE_CHECKING:
    from megatron_prefix.conversion.hf_folder import Shard

_SHARD_BYTES = 10**9
"""Of each rank that writes."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A shard without its data; equal on all ranks that hold a copy."""

    key: str
    index: Shape
    place: tuple[tuple[int, int], ...]
    """Start and stop along each axis."""
    global_shape: Shape
    dtype: torch.dtype

    @property
    def whole_shape(self) -> Shape:
        return self.global_shape[len(self.index) :]

    @property
    def shape(self) -> Shape:
        return tuple(stop - start for start, stop in self.place)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(*bounds) for bounds in self.place)


_Parts = dict[_Part, list[int]]
"""What makes up a tensor, once each, and the ranks that hold it."""


def weights_exporter(
    chunks: ModelChunks,
    model: ModelConfig,
    *,
    timeout_minutes: float,
    shard_bytes: int = _SHARD_BYTES,
) -> Callable[[Path], None]:
    """What writes config.json and the weights, as they are then, into a folder that is there.

    Collective over all ranks, and so is the result. The folder has to be there for rank 0.

    Args:
        chunks: this rank's, which the weights are read from each time.
        model: what they are.
        timeout_minutes: that a rank waits for another one's part.
        shard_bytes: of a file, about.

    Raises:
        ValueError: the conversion's packages are not installed, or the model is of no Hugging Face
            family that it knows, naming the option, or has a parameter that the family lacks.
    """
    with needed_by("writing the weights as a Hugging Face model", extra="rollouts"):
        from megatron_prefix.conversion.checks import check_stored
        from megatron_prefix.conversion.hf_config import config_values
        from megatron_prefix.conversion.hf_folder import ShardWriter, finish_shards, write_json
        from megatron_prefix.conversion.mapping import Mapping, dtype_name
        from megatron_prefix.conversion.model_section import from_model_config

        mapping = Mapping(from_model_config(model))
        values = config_values(mapping.architecture, dtype_name(chunks.config.params_dtype))
    parameters = mapping.parameters()
    # Parts travel through the processes' own memory: a GPU has none to spare for them.
    group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
    rank = dist.get_rank()
    axes = {
        key + end: len(index)
        for parameter in parameters
        for key, index in parameter.places
        for end, _ in parameter.stored
    }
    parts = _all_parts(list(_own_parts(chunks, axes)), group)
    shapes = {key: _any_of(found).global_shape for (key, _), found in parts.items()}
    places = check_stored(shapes, mapping.architecture, parameters, of="the model in training")
    # Of each parameter the tensors that Megatron stores it as, one behind the other.
    stored = [
        [parts[key + end, index] for end, _ in parameter.stored]
        for parameter, (key, index) in zip(parameters, places, strict=True)
    ]

    def export(directory: Path) -> None:
        mine = _own_parts(chunks, axes)
        writers = _writers(stored, _ranks_that_see(directory, group))
        writer = ShardWriter(directory, max_shard_bytes=shard_bytes, prefix=f"rank-{rank:05d}")
        failure: Exception | None = None
        for parameter, tensors, target in zip(parameters, stored, writers, strict=True):
            found = [_collect(tensor, mine, target, rank, group) for tensor in tensors]
            # After a failure, too, others wait for their parts to be taken.
            if target != rank or failure is not None:
                continue
            try:
                whole = torch.cat(found) if len(found) > 1 else found[0]
                for name, tensor in mapping.to_hf(parameter, whole).items():
                    writer.add(name, tensor)
            except Exception as error:
                failure = error

        def close() -> list[Shard]:
            if failure is not None:
                raise failure
            return writer.close()

        shards = [shard for of_rank in gather(close) for shard in of_rank]

        def finish() -> None:
            finish_shards(directory, shards)
            write_json(directory / "config.json", values)

        on_rank_0(finish)

    return export


def _any_of(parts: _Parts) -> _Part:
    """One of a tensor's parts: each tells what the whole is."""
    return next(iter(parts))


def _own_parts(chunks: ModelChunks, axes: dict[str, int]) -> dict[_Part, Tensor]:
    """This rank's.

    Args:
        axes: how many leading axes a tensor has, by its key. One of all experts of a layer has
            fewer than the experts' shards; further ones are places in it.
    """
    parts = {}
    for shard in parameter_shards(chunks):
        count = axes.get(shard.key, len(shard.index))
        within = [(i, i + 1) for i in shard.index[count:]]
        part = _Part(
            key=shard.key,
            index=shard.index[:count],
            place=(*within, *((bounds.start, bounds.stop) for bounds in shard.place)),
            global_shape=shard.global_shape,
            dtype=shard.data.dtype,
        )
        parts[part] = shard.data
    return parts


def _all_parts(own: list[_Part], group: dist.ProcessGroup) -> dict[tuple[str, Shape], _Parts]:
    """The parts of each tensor, by key and leading indices."""
    everyone: list[list[_Part]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, own, group=group)
    found: dict[tuple[str, Shape], _Parts] = defaultdict(dict)
    for rank, held in enumerate(everyone):
        for part in held:
            found[part.key, part.index].setdefault(part, []).append(rank)
    for (key, index), parts in found.items():
        whole = math.prod(_any_of(parts).whole_shape)
        covered = sum(math.prod(part.shape) for part in parts)
        if covered != whole:
            raise RuntimeError(f"{key} {list(index)}: ranks hold {covered} of {whole} elements")
    return found


def _ranks_that_see(directory: Path, group: dist.ProcessGroup) -> list[int]:
    """Ranks for which `directory` is the one that rank 0 sees, and not another of its name."""
    token = [uuid.uuid4().hex]
    dist.broadcast_object_list(token, src=0, group=group)
    marker = directory / f".seen-{token[0]}"

    on_rank_0(marker.touch)
    seen = gather(marker.exists)
    if dist.get_rank() == 0:
        marker.unlink()
    return [rank for rank, sees in enumerate(seen) if sees]


def _writers(stored: list[list[_Parts]], seeing: list[int]) -> list[int]:
    """The rank that writes each parameter: of those that hold some of it, the least busy."""
    load = dict.fromkeys(seeing, 0)
    writers = []
    for tensors in stored:
        holders = {rank for parts in tensors for ranks in parts.values() for rank in ranks}
        writer = min(holders & load.keys() or seeing, key=lambda rank: (load[rank], rank))
        load[writer] += sum(math.prod(_any_of(parts).whole_shape) for parts in tensors)
        writers.append(writer)
    return writers


def _collect(
    parts: _Parts,
    mine: dict[_Part, Tensor],
    writer: int,
    rank: int,
    group: dist.ProcessGroup,
) -> Tensor | None:
    """The whole tensor on its writer; None elsewhere.

    All ranks go through the tensors, and the parts of each, in one order.
    """
    whole: Tensor | None = None
    if rank == writer:
        part = _any_of(parts)
        whole = torch.empty(part.whole_shape, dtype=part.dtype)
    for part, ranks in parts.items():
        # The writer's own, or that of the nearest rank: most likely of the same machine.
        sender = min(ranks, key=lambda holder: (abs(holder - writer), holder))
        if sender == rank:
            own = mine[part].detach().reshape(part.shape)
            if whole is not None:
                whole[part.slices] = own.cpu()
            else:
                dist.send(own.cpu().contiguous(), writer, group=group)
        elif whole is not None:
            received = torch.empty(part.shape, dtype=part.dtype)
            dist.recv(received, sender, group=group)
            whole[part.slices] = received
    return whole
