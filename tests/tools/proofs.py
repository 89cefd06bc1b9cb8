"""What the tests of the proof tool have in common."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_prefix.config import ModelConfig
from megatron_prefix.config.loader import load_dataclass
from tests import fork_server

# One-token prompts and responses, a group of one, very unequal responses.
SHAPES = [
    {"prefix": 11, "responses": [3, 7, 1, 5]},
    {"prefix": 1, "responses": [2, 4]},
    {"prefix": 9, "responses": [6]},
    {"prefix": 5, "responses": [20, 1]},
]


# The shapes are short, so that a run would share few of them: each of these proofs is of sharing.
ALWAYS = {"share_only_where_it_pays": False}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/verify_equivalence.py; its processes come from the tests' server, and find it by the
    path that they inherit."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "tools"))
    fork_server.ensure_running()
    import verify_equivalence

    return verify_equivalence


def small_model(tool: ModuleType, **transformer: Any) -> ModelConfig:
    values = {
        **tool.DEFAULT_MODEL,
        "transformer": {**tool.DEFAULT_MODEL["transformer"], "hidden_size": 32, **transformer},
    }
    return load_dataclass(ModelConfig, values)


def assert_exact(tool: ModuleType, report: dict[str, Any]) -> None:
    assert report["ok"]
    for name, bound in tool.TOLERANCES["float64"].items():
        assert report[name] <= bound


SHAPES_OF_RANKS = [
    {"prefix": 5, "responses": [19, 23, 18]},
    {"system": 17, "prefix": 30, "responses": [9, 14, 7]},
    {"system": 17, "prefix": 2, "responses": [41, 3]},
    {"prefix": 22, "responses": [2, 60]},
    {"prefix": 37, "responses": [12]},
]

SHAPES_OVER_THE_BUDGET = [
    {"prefix": 20, "responses": [3, 7, 1, 5, 6, 2]},
    {"prefix": 1, "responses": [2, 4]},
    {"prefix": 9, "responses": [6, 3]},
    {"prefix": 15, "responses": [20, 1, 9, 11]},
    {"prefix": 12, "responses": [5]},
]
SERIES = {**ALWAYS, "share_across_microbatches": True}
