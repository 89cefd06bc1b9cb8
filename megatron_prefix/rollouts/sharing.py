"""What one rank has made, on all ranks: results, and errors too, so that none is left waiting."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_prefix.rollouts.engine import EndOfRollouts

Result = TypeVar("Result")

_BEAT_S = 15.0
"""How often rank 0 tells the others that it is still waiting, so that no collective times out."""


def from_rank_0(
    future: concurrent.futures.Future[Result] | None, *, beat_s: float = _BEAT_S
) -> Any:
    """The result of rank 0's future on every rank. Collective.

    Args:
        future: on rank 0; None elsewhere.
        beat_s: seconds between the signs of life in between.

    Raises:
        EndOfRollouts, ValueError: what the future raised, on every rank; other errors of rank 0
            are raised there as they are, and elsewhere as a RuntimeError.
    """
    while True:
        message: list[Any] = [None]
        error: BaseException | None = None
        if future is not None:
            try:
                message = [("done", future.result(timeout=beat_s))]
            except concurrent.futures.TimeoutError:
                # The future's own TimeoutError is the same class.
                error = future.exception() if future.done() else None
                message = [("waiting", None)] if error is None else [_described(error)]
            except BaseException as caught:
                error = caught
                message = [_described(caught)]
        dist.broadcast_object_list(message, src=0)
        kind, value = message[0]
        if kind == "done":
            return value
        if kind != "waiting":
            if error is not None:
                raise error
            raise {"end": EndOfRollouts, "value": ValueError}.get(kind, RuntimeError)(value)


def gather(compute: Callable[[], Result]) -> list[Result]:
    """What `compute` returns on each rank, in their order, on every rank. Collective.

    Raises:
        ValueError: what `compute` raised on the first rank where it raised one.
    """
    mine: Any
    error: Exception | None = None
    try:
        mine = ("done", compute())
    except Exception as caught:
        error = caught
        mine = _described(caught)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, (kind, value) in enumerate(everyone):
        if kind == "done":
            continue
        if error is not None and rank == dist.get_rank():
            raise error
        raise {"end": EndOfRollouts, "value": ValueError}.get(kind, RuntimeError)(value)
    return [value for _, value in everyone]


def _described(error: BaseException) -> tuple[str, str]:
    if isinstance(error, EndOfRollouts):
        return "end", str(error)
    if isinstance(error, (ValueError, OSError)):
        return "value", str(error)
    return "other", f"rank 0: {type(error).__name__}: {error}"
