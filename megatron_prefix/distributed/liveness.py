"""Which ranks are gone, when a collective has failed.

A failed collective says that a connection was closed or that time ran out, not by whom: often the
peer is a rank that has only lost another one itself. So every rank counts in the job's store once a
second, from a thread, also while it waits for others. Ranks whose count stands still are gone. The
first rank to find some writes its verdict into the store, and every rank ends by it, also one whose
own collective would go on waiting.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

_INTERVAL_S = 1.0
_SILENCE_S = 5.0
"""A rank that has not counted for so long is gone: it ended, or it was stopped."""
_GRACE_S = 10.0
"""How long a rank may still take to meet what others have met, and to say so itself."""

_STORE_ERRORS = (dist.DistError, RuntimeError)


class Liveness:
    """This rank's sign of life, and a look at the others'."""

    def __init__(self, rank: int, world_size: int) -> None:
        """Begin to count.

        Args:
            rank: of this process.
            world_size: ranks of the job; one alone needs no store and gets none.
        """
        self._rank, self._world_size = rank, world_size
        self._closed = threading.Event()
        self._looking = threading.Lock()
        self._on_lost: Callable[[list[int]], None] | None = None
        self._store: dist.Store | None = None
        self._thread: threading.Thread | None = None
        if world_size > 1:
            # Connections of its own, and one for each thread: a store's client serves one call at
            # a time.
            self._store = _connect()
            self._thread = threading.Thread(target=self._count, args=(_connect(),), daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop counting and looking: from now on this rank is gone.

        Waits for threads that do so, since Python aborts where it ends while one of them is in a
        call of the store's; but not for long, since the store's host may have been stopped.
        """
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=_SILENCE_S)
        if self._looking.acquire(timeout=_SILENCE_S):
            self._looking.release()

    def end_with_others(self, on_lost: Callable[[list[int]], None]) -> None:
        """Call `on_lost`, from a thread, if others have lost ranks and this one still waits."""
        self._on_lost = on_lost

    def lost_ranks(self) -> list[int]:
        """Ranks that do not count any more; takes some seconds, unless others have found them.

        The host of the store (rank 0, unless an elastic agent keeps it) is named when the store
        itself has gone. None are named once this rank has closed.
        """
        if self._store is None:
            return []
        with self._looking:
            return [] if self._closed.is_set() else self._look()

    def _look(self) -> list[int]:
        assert self._store is not None
        try:
            before = self._counts()
            deadline = time.monotonic() + _SILENCE_S
            while time.monotonic() < deadline:
                if verdict := _verdict(self._store):
                    return verdict
                if self._closed.wait(0.2):
                    return []
            pairs = zip(before, self._counts(), strict=True)
            lost = [rank for rank, (first, second) in enumerate(pairs) if first == second]
            if lost:
                # The first verdict holds: whoever has ended since has ended by it.
                self._store.compare_set(_key("lost"), "", ",".join(map(str, lost)))
                return _verdict(self._store)
        except _STORE_ERRORS:
            return [0]
        return lost

    def leave(self, lost: list[int]) -> None:
        """Say that this rank ends because of others; the store's host waits until all have."""
        if self._store is None:
            return
        try:
            self._store.add(_key("left"), 1)
            deadline = time.monotonic() + 2 * _GRACE_S
            staying = self._world_size - len(lost)
            while self._hosts_store() and time.monotonic() < deadline:
                if self._store.add(_key("left"), 0) >= staying:
                    return
                time.sleep(0.2)
        except _STORE_ERRORS:
            return

    def _hosts_store(self) -> bool:
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return self._rank == 0 and not agent

    def _counts(self) -> list[int]:
        assert self._store is not None
        return [self._store.add(_key(f"alive/{rank}"), 0) for rank in range(self._world_size)]

    def _count(self, store: dist.Store) -> None:
        try:
            while not self._closed.wait(_INTERVAL_S):
                store.add(_key(f"alive/{self._rank}"), 1)
                lost = _verdict(store)
                if lost and self._on_lost is not None:
                    # Most ranks fail by themselves, and then have more to say.
                    if not self._closed.wait(_GRACE_S):
                        self._on_lost(lost)
                    return
        except _STORE_ERRORS:
            return  # the store has gone, and the job with it


def _verdict(store: dist.Store) -> list[int]:
    """The ranks that somebody has found gone."""
    if not store.check([_key("lost")]):
        return []
    return [int(rank) for rank in store.get(_key("lost")).decode().split(",")]


def _key(what: str) -> str:
    return f"megatron_prefix/{attempt()}/{what}"


def attempt() -> str:
    """Tells a start of the job's ranks from those before it in the same store.

    torchrun keeps one store for all starts on one machine. Over several machines its agents count
    starts differently; there the launch scripts ask for a new store each time.
    """
    on_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if on_one_machine else "0"


def _connect() -> dist.Store:
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=30),
    )
