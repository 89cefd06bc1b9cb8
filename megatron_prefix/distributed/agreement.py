"""Ranks that would wait for each other for ever are stopped before they start."""

from __future__ import annotations

import torch.distributed as dist


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
