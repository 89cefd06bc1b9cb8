"""What ranks have made, on all ranks: results, and errors too, so that none is left waiting."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")

_BEAT_S = 15.0
"""How often rank 0 tells the others that it is still waiting, so that no collective times out."""

_Errors = tuple[type[Exception], ...]


def from_rank_0(
    future: concurrent.futures.Future[Result] | None,
    *,
    tell: Callable[[Result], Result] = lambda result: result,
    errors: _Errors = (ValueError, OSError),
    beat_s: float = _BEAT_S,
) -> Result:
    """The result of rank 0's future on every rank. Collective.

    Args:
        future: on rank 0; None elsewhere.
        tell: what the other ranks get of the result.
        errors: made of a message alone; one of these on rank 0 is raised on every rank, as the
            first that it is an instance of.
        beat_s: seconds between the signs of life in between.

    Raises:
        RuntimeError: on the other ranks, where the future raised another error; rank 0 has that.
    """
    while True:
        message: list[Any] = [None]
        error: BaseException | None = None
        if future is not None:
            done, _ = concurrent.futures.wait([future], timeout=beat_s)
            if done:
                error = future.exception()
                message = [_told(error, errors) if error else (True, tell(future.result()))]
        dist.broadcast_object_list(message, src=0)
        if message[0] is not None:
            break
    if future is not None:
        return future.result()
    return _taken(message[0], errors)


def on_rank_0(
    compute: Callable[[], Result],
    *,
    tell: Callable[[Result], Result] = lambda result: result,
    errors: _Errors = (ValueError, OSError),
) -> Result:
    """What `compute` returns on rank 0, where alone it runs, on every rank. Collective.

    Args:
        compute: runs on rank 0.
        tell: what the other ranks get of the result.
        errors: see `from_rank_0`.

    Raises:
        RuntimeError or one of `errors`: `compute` raised; see `from_rank_0`.
    """
    if dist.get_rank() != 0:
        return from_rank_0(None, errors=errors)
    # In a thread, so that the other ranks hear from this one however long it takes.
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
        return from_rank_0(thread.submit(compute), tell=tell, errors=errors)


def rank_0_alone(
    compute: Callable[[], Result], *, errors: _Errors = (ValueError, OSError)
) -> Result | None:
    """What `compute` returns, on rank 0, where alone it runs; None on other ranks. Collective.

    Raises:
        RuntimeError or one of `errors`: `compute` raised, on every rank; see `from_rank_0`.
    """
    return on_rank_0(compute, tell=lambda result: None, errors=errors)


def gather_to_rank_0(
    compute: Callable[[], Result], *, errors: _Errors = (ValueError, OSError)
) -> list[Result] | None:
    """What `compute` returns on each rank, in their order, on rank 0; elsewhere None. Collective.

    Raises:
        RuntimeError or one of `errors`: `compute` raised on some rank; see `gather`.
    """
    mine: list[Result] = []
    gather(lambda: mine.append(compute()), errors=errors)
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine[0], everyone)
    return everyone


def gather(
    compute: Callable[[], Result], *, errors: _Errors = (ValueError, OSError)
) -> list[Result]:
    """What `compute` returns on each rank, in their order, on every rank. Collective.

    Raises:
        RuntimeError or one of `errors`: `compute` raised on some rank; the first rank's error, as
            in `from_rank_0`, or this rank's own.
    """
    error: Exception | None = None
    try:
        mine: Any = (True, compute())
    except Exception as caught:
        error, mine = caught, _told(caught, errors)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if error is not None:
        raise error
    return [_taken(told, errors) for told in everyone]


@contextlib.contextmanager
def raise_together(*, name_rank: bool | Literal["others"] = True) -> Iterator[None]:
    """Raise an error of any rank on all of them, so that none is left waiting. Collective.

    For blocks whose ranks compute the same: user's data and user's functions are read on every
    rank, and may fail on one alone.

    Args:
        name_rank: False where it does not matter which rank it was, such as where one acts for all;
            "others" where rank 0 alone reads what the user gave, and other ranks may fail too.

    Raises:
        ValueError: the block's own (or its OSError) where every rank has the same; otherwise that
            of the first rank that has one, naming the rank.
    """
    error = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = caught
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if error is None else str(error))
    if error is not None and len(set(messages)) == 1:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            is_named = rank != 0 if name_rank == "others" else name_rank
            where = f"rank {rank} of {len(messages)}: " if is_named else ""
            raise ValueError(f"{where}{message}") from error


def _told(error: BaseException, errors: _Errors) -> tuple[bool, tuple[int | None, str]]:
    kind = next((i for i, cls in enumerate(errors) if isinstance(error, cls)), None)
    return False, (kind, str(error) if kind is not None else f"{type(error).__name__}: {error}")


def _taken(told: tuple[bool, Any], errors: _Errors) -> Any:
    is_result, value = told
    if is_result:
        return value
    kind, text = value
    raise RuntimeError(f"on another rank: {text}") if kind is None else errors[kind](text)
