"""A rank that dies or hangs in the middle of a step: the others end, and say which one it was."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_prefix.distributed.liveness import Liveness
from tests import fork_server
from tests.commands import python_process
from tests.distributed import run_distributed
from tests.training.runs import (
    good_records,
    read_rows,
    run_values,
    torchrun,
    write_config,
    write_records,
)

TIMEOUT_MINUTES = 0.4  # of the process groups


def _config(folder: Path, *, steps: int) -> Path:
    """A run on two context-parallel ranks, of two pipeline stages."""
    records = write_records(folder / "rollouts.jsonl", good_records(4))
    values = run_values(
        folder / "out",
        records=records,
        parallel={"context_parallel_size": 2, "pipeline_model_parallel_size": 2},
        training={"steps": steps, "timeout_minutes": TIMEOUT_MINUTES},
        output={"save_every": 2},
    )
    return write_config(folder / "run.yaml", values)


@contextlib.contextmanager
def _ranks(config: Path, world_size: int) -> Iterator[list[BaseProcess]]:
    """One process per rank without an agent that would end them, as srun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder, processes = config.parent, []
    try:
        for rank in range(world_size):
            place = {
                **fork_server.gloo_environment(),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            with fork_server.changed_environment(place):
                process = python_process(
                    ["-m", "megatron_prefix.training", config],
                    stdout=folder / f"stdout_{rank}",
                    stderr=folder / f"stderr_{rank}",
                )
            process.start()
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            fork_server.kill(process)


def _wait_for_steps(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(read_rows(folder / "out")) < count:
        assert time.monotonic() < deadline, "the run did not come that far"
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_others_in_time_with_an_error_that_names_it(
    how: signal.Signals, tmp_path: Path
) -> None:
    config = _config(tmp_path, steps=1_000_000)
    with _ranks(config, 4) as processes:
        _wait_for_steps(tmp_path, 5)
        lost = 2
        os.kill(processes[lost].pid, how)
        started = time.monotonic()
        for rank, process in enumerate(processes):
            if rank == lost:
                continue
            process.join(timeout=60 * TIMEOUT_MINUTES + 60)
            stderr = (tmp_path / f"stderr_{rank}").read_text()
            assert process.exitcode == 1, stderr
            (error,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
            assert error.startswith(f"error: rank {rank}: lost rank {lost} (ended or stopped)")
        # Within the timeout, and the seconds that the look at the others takes.
        assert time.monotonic() - started < 60 * TIMEOUT_MINUTES + 30


def test_torchrun_names_the_lost_rank_and_the_run_continues_from_its_checkpoint(
    tmp_path: Path,
) -> None:
    endless = _config(tmp_path, steps=1_000_000)
    with _killed_when(tmp_path, steps=5):
        done = torchrun(endless, processes=4, timeout=200)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    reached = len(read_rows(tmp_path / "out"))
    newest = max(path.name for path in (tmp_path / "out" / "checkpoints").glob("step_??????"))
    saved = int(newest.removeprefix("step_"))
    # Of the steps since, none is promised; a checkpoint that was being written is not there.
    assert 0 <= reached - saved <= 4

    with _ranks(_config(tmp_path, steps=saved + 2), 4) as processes:
        for rank, process in enumerate(processes):
            process.join(timeout=100)
            assert process.exitcode == 0, (tmp_path / f"stderr_{rank}").read_text()
    assert [row["step"] for row in read_rows(tmp_path / "out")] == list(range(1, saved + 3))


@contextlib.contextmanager
def _killed_when(folder: Path, *, steps: int) -> Iterator[None]:
    """Kill rank 1 of the run in `folder` when it has taken so many steps."""
    script = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "config, metrics, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])\n"
        "def rank_one():\n"
        "    for path in Path('/proc').glob('[0-9]*'):\n"
        "        try:\n"
        "            command = (path / 'cmdline').read_bytes().decode().split('\\0')\n"
        "            environ = (path / 'environ').read_bytes().decode().split('\\0')\n"
        "        except OSError:\n"
        "            continue\n"
        "        if config in command and 'RANK=1' in environ:\n"
        "            return int(path.name)\n"
        "while not metrics.exists() or metrics.read_text().count('\\n') < steps:\n"
        "    time.sleep(0.02)\n"
        "os.kill(rank_one(), signal.SIGKILL)\n"
    )
    killer = subprocess.Popen(
        [
            *(sys.executable, "-c", script, str(folder / "run.yaml")),
            *(str(folder / "out" / "metrics.jsonl"), str(steps)),
        ]
    )
    try:
        yield
        assert killer.wait(timeout=10) == 0
    finally:
        killer.kill()
        killer.wait()


def test_ranks_without_a_signal_of_life_are_those_that_have_closed() -> None:
    found = run_distributed(_silent, 3)
    assert found == [[1], None, [1]]


def _silent(rank: int, world_size: int) -> list[int] | None:
    liveness = Liveness(rank, world_size)
    time.sleep(2.5)
    if rank == 1:
        liveness.close()
    dist.barrier()
    silent = None if rank == 1 else liveness.lost_ranks()
    dist.barrier()
    return silent


def test_a_rank_that_closes_leaves_no_thread_in_a_call_of_the_store() -> None:
    """Python aborts where it ends under one."""
    assert run_distributed(_close_while_it_looks, 2) == [True, True]


def _close_while_it_looks(rank: int, world_size: int) -> bool:
    liveness = Liveness(rank, world_size)
    looking = threading.Thread(target=liveness.lost_ranks, daemon=True)
    looking.start()
    time.sleep(0.5)
    dist.barrier()  # both look
    began = time.monotonic()
    liveness.close()
    looking.join(timeout=1)
    over = not looking.is_alive() and time.monotonic() - began < 3
    dist.barrier()  # rank 0 holds the store
    return over and liveness.lost_ranks() == []
