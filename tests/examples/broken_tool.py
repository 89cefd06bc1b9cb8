"""The environment of the agent example with a tool that breaks, in another way for each shelf."""

from __future__ import annotations

import os
import time
from typing import Any

import lookup as example

FAULTS = ("hang", "raise", "exit", "garbage", "flood")


def is_broken(shelf: str, answer: dict[str, Any]) -> bool:
    """Whether opening this shelf costs the response: the first one of a task does."""
    return shelf == next(iter(answer["shelves"])) and FAULTS[int(shelf) % 5] != "flood"


def lookup(messages: list[dict[str, Any]], answer: dict[str, Any]) -> Any:
    """Fail where the first shelf is opened."""
    said = messages[-1]["content"].strip()
    if len(messages) == 2 and said == next(iter(answer["shelves"])):
        fault = FAULTS[int(said) % 5]
        if fault == "hang":
            time.sleep(3600)
        if fault == "raise":
            raise OSError("the shelf is stuck")
        if fault == "exit":
            os._exit(1)
        if fault == "garbage":
            return [said]
        os.write(1, b"1\n" * 100_000)
    return example.lookup(messages, answer)
