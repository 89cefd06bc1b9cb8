"""The example of a model that one builds oneself: it runs, is exact, and its picture is right."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_prefix import PrefixTree, pack

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "add_to_a_model.py"


@pytest.mark.parametrize("processes", [1, 2])
def test_it_runs_without_a_word_of_warning_and_is_exact(processes: int) -> None:
    launcher = [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
    ]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT)],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        },
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first, tokens, log_probs, gradients = done.stdout.splitlines()
    assert first == f"processes (tensor parallel): {processes}"
    assert tokens == "tokens computed: 22 packed, 33 with the prompts repeated"
    for line, what in ((log_probs, "log-probabilities"), (gradients, "gradients")):
        found = re.fullmatch(rf"largest difference of {what}: +(\S+)", line)
        assert found and float(found[1]) < 1e-12


def test_the_packed_row_is_as_its_picture_shows(script: ModuleType) -> None:
    layout = pack(PrefixTree.from_groups(script.GROUPS[:1]))
    picture = script.log_probs_of_packed_row.__doc__
    for name, values in (
        ("inputs", layout.input_ids),
        ("labels", layout.labels),
        ("positions", layout.position_ids),
    ):
        (shown,) = re.findall(rf"^ +{name} (.*)$", picture, re.MULTILINE)
        assert [int(number) for number in shown.replace("|", " ").split()] == values.tolist()


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("add_to_a_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
