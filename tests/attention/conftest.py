"""A fresh seed for every test, printed when it fails."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

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
