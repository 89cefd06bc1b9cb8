"""Items are planned in a thread, in order, and made when they are asked for, the next one too."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from megatron_prefix.training.prefetch import Prefetched


def test_items_are_made_once_in_this_thread_from_what_another_thread_has_planned() -> None:
    planned_by: list[int] = []
    made: list[int] = []

    def plan(index: int) -> Callable[[], int]:
        def run() -> int:
            planned_by.append(threading.get_ident())
            return index

        return run

    def to_device(index: int) -> str:
        assert threading.get_ident() not in planned_by
        made.append(index)
        return f"item {index}"

    items = Prefetched([plan(index) for index in range(4)], to_device)
    assert items.planned() == [0, 1, 2, 3]
    assert made == [] and len(items) == 4
    assert items[0] == "item 0"
    assert made == [0, 1]  # the next one's copy is under way
    assert list(items) == [f"item {index}" for index in range(4)]
    assert items[-1] == "item 3" and items[1:3] == ["item 1", "item 2"]
    assert made == [0, 1, 2, 3]
    assert len(set(planned_by)) == 1


def test_an_item_that_is_not_planned_yet_is_waited_for_and_the_next_one_is_not() -> None:
    go_on = threading.Event()
    made: list[int] = []

    def slow() -> int:
        go_on.wait(30)
        return 1

    def to_device(index: int) -> int:
        made.append(index)
        return index

    items = Prefetched([lambda: 0, slow], to_device)
    assert items[0] == 0 and made == [0]
    go_on.set()
    assert items[1] == 1 and made == [0, 1]


def test_an_error_of_planning_is_raised_where_the_item_is_asked_for() -> None:
    def fail() -> int:
        raise ValueError("group 3 is wrong")

    items = Prefetched([lambda: 0, fail], lambda index: index)
    with pytest.raises(ValueError, match="group 3 is wrong"):
        items.planned()
    assert items[0] == 0
    with pytest.raises(ValueError, match="group 3 is wrong"):
        _ = items[1]
