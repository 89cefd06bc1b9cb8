"""A fresh seed for every test, printed when it fails, and one thread unless it asks for more."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch


@pytest.fixture
def rng() -> Iterator[np.random.Generator]:
    """Random numbers for the test, torch's included. TEST_SEED=n repeats a failure."""
    seed = int(os.environ.get("TEST_SEED", secrets.randbits(32)))
    print(f"TEST_SEED={seed}")
    torch.manual_seed(seed)
    yield np.random.default_rng(seed)


@pytest.fixture(autouse=True)
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's threads for one test: small tensors gain nothing from a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)
