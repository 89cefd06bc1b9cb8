"""Small runs for the tests: their rollouts, their configuration, and ways to start them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml

from megatron_prefix.config import RunConfig
from megatron_prefix.config.loader import load_dataclass
from megatron_prefix.distributed.runtime import runtime_of_run
from megatron_prefix.training import __main__ as command
from megatron_prefix.training import errors
from megatron_prefix.training.trainer import Trainer

VOCAB_SIZE = 64
MAX_SEQUENCE_LENGTH = 32

TENSOR = {"tensor_model_parallel_size": 2}
PIPELINE = {"pipeline_model_parallel_size": 2}
CONTEXT = {"context_parallel_size": 2}
DATA: dict[str, int] = {}


def good_records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Groups of a shared prompt and four responses of different lengths."""
    rng = np.random.default_rng(seed)

    def tokens(length: int) -> list[int]:
        return rng.integers(0, VOCAB_SIZE, length).tolist()

    return [
        {
            "prompt": tokens(int(rng.integers(6, 10))),
            "responses": [tokens(length) for length in (3, 5, 2, 4)],
            "rewards": [1.0, 0.0, 0.5, 0.25],
        }
        for _ in range(count)
    ]


def write_records(path: Path, records: Sequence[dict[str, Any] | str]) -> Path:
    """One record per line; text goes into the file as it is."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def run_values(folder: Path, *, records: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration as plain values; `sections` change it."""
    values: dict[str, Any] = {
        "model": {
            "vocab_size": VOCAB_SIZE,
            "max_sequence_length": MAX_SEQUENCE_LENGTH,
            "transformer": {
                "num_layers": 2,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "ffn_hidden_size": 48,
                "gated_linear_unit": True,
            },
        },
        "parallel": {},
        "training": {
            "steps": 2,
            "token_budget": 64,
            "dtype": "float32",
            "device": "cpu",
            "timeout_minutes": 1,
        },
        "optimizer": {"lr": 1e-3},
        "objective": {},
        "rollouts": {"paths": [str(records)], "groups_per_step": 2},
        "output": {"directory": str(folder), "tensorboard": False, "plot": False},
    }
    for section, changes in sections.items():
        values[section] = {**values[section], **changes}
    return values


@contextlib.contextmanager
def trainer(values: dict[str, Any]):
    """A trainer in the process group that is there, within Megatron's state."""
    config = load_dataclass(RunConfig, values)
    with runtime_of_run(config) as place:
        yield Trainer(config, place)


def write_config(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def run_command(config: Path, *words: str) -> tuple[int, str]:
    """The entry point in this process: its exit status and what it wrote to stderr.

    Rank 0's report is not waited for: nobody ends these processes when it has come.
    """
    with (
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        mock.patch.object(sys, "argv", ["training", str(config), *words]),
        mock.patch.object(errors, "GRACE_S", 0.0),
    ):
        status = command.main()
    return status, stderr.getvalue()


def torchrun(
    config: Path, *, processes: int = 2, timeout: float = 300.0, ignore_warnings: bool = True
) -> subprocess.CompletedProcess[str]:
    """`torchrun -m megatron_prefix.training config`; nothing of it is left, whatever happens."""
    warnings = ("-W", "ignore") if ignore_warnings else ()
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), str(config.parent), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [
            *(sys.executable, *warnings, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes)),
            *("-m", "megatron_prefix.training", str(config)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=config.parent,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        },
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics without what two runs of the same data never agree in."""
    return {name: value for name, value in row.items() if "second" not in name and name != "mfu"}


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none where it wrote none."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
