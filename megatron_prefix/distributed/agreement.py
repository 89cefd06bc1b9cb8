"""Ranks that would wait for each other for ever are stopped before they start."""

from __future__ import annotations

import torch.distributed as dist

from megatron_prefix.layout import ContextShards


def check_equal_across_ranks(what: str, value: str, *, group: dist.ProcessGroup | None) -> None:
    """Raise on every rank of `group` if `value` is not the same everywhere.

    Called before anything whose difference would let ranks wait for each other forever.

    Raises:
        RuntimeError: naming `what`, the ranks and their values.
    """
    values: list[tuple[int, str] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, (dist.get_rank(), value), group=group)
    if len({v for _, v in values}) > 1:
        listed = "; ".join(f"rank {r}: {v}" for r, v in values)
        raise RuntimeError(f"{what} differs between ranks ({listed})")


def check_same_row(shards: ContextShards | None, group: dist.ProcessGroup) -> None:
    """Raise on every rank of a context-parallel group if they hold parts of different rows.

    Args:
        shards: how this rank thinks its row is distributed: `params.shards`. None, as on a group of
            one rank: there is nothing to compare.
        group: the ranks that it is distributed over.

    Raises:
        RuntimeError: with the rows of all ranks.
    """
    if shards is not None:
        check_equal_across_ranks("the packed row", shards.summary(), group=group)
