"""Items that are made on the host while earlier ones run on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar, overload

Planned = TypeVar("Planned")
Item = TypeVar("Item")


class Prefetched(Sequence[Item], Generic[Planned, Item]):
    """Items in order, each made when it is first asked for, and kept.

    A thread plans all of them, one after the other. What is planned of the next item when one is
    asked for goes to the device at once, so that its copy is over when its turn comes.
    """

    def __init__(
        self,
        plans: Sequence[Callable[[], Planned]],
        to_device: Callable[[Planned], Item],
    ) -> None:
        """Start planning.

        Args:
            plans: of each item; called in a thread, so it may not touch the device.
            to_device: makes an item of what was planned.
        """
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="microbatches")
        self._planned = [thread.submit(plan) for plan in plans]
        thread.shutdown(wait=False)  # it ends when all is planned
        self._to_device = to_device
        self._items: dict[int, Item] = {}

    def planned(self) -> list[Planned]:
        """What was planned of each item; waits for it."""
        return [future.result() for future in self._planned]

    def __len__(self) -> int:
        return len(self._planned)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        item = self._item(index)
        if index + 1 < len(self):
            following = self._planned[index + 1]
            if following.done() and following.exception() is None:
                self._item(index + 1)
        return item

    def _item(self, index: int) -> Item:
        if index not in self._items:
            self._items[index] = self._to_device(self._planned[index].result())
        return self._items[index]
