"""verl's real engine, ours beside its own, by tools/verify_verl.py: a layout for each mechanism."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools" / "verify_verl.py"


def verify(*options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(TOOL), "--seed", "1", "--json", *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param("--tp 2 --cp 2", id="context-parallel"),
        pytest.param("--dp 2 --ep 2 --token-budget 100", id="experts"),
    ],
)
def test_whole_groups_run_once_and_equal_verls_own(options: str) -> None:
    report = verify(*options.split())
    assert report["ok"] and report["tokens_ok"]
    # A row is padded to tp x cp tokens.
    assert 0 <= report["tokens_ours"] - report["tokens_needed"] < 4
    assert report["tokens_needed"] < report["tokens_stock"] / 2


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param("--dp 2 --distributed-optimizer --token-budget 60", id="budget"),
        pytest.param("--pp 2 --vpp 2 --micro-batch-size 4", id="interleaved"),
    ],
)
def test_split_groups_equal_verls_own(options: str) -> None:
    report = verify(*options.split())
    assert report["ok"]
    assert report["tokens_needed"] < report["tokens_ours"] < report["tokens_stock"]
