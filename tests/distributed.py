"""Run a function on several real processes that form a gloo process group.

Each call has new processes, forked from a server that has imported torch and Megatron
(`tests/fork_server.py`). They find each other through a store in this process (whose port is bound
before they start, so no other process can take it). Results and errors come back as files: pickled
bytes hold no handles to shared memory of a process that has ended.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests import fork_server

_PEERS_GRACE_S = 5.0
"""How long the other ranks may go on after one has failed, to report their own errors."""


class RankError(RuntimeError):
    """A rank failed or did not finish; the message holds the traceback of each such rank.

    What the ranks have printed goes to stderr, where pytest shows it with the failure.

    Attributes:
        rank: the rank that failed first.
    """

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    init_process_group: bool = True,
) -> list[Any]:
    """Call `fn(rank, world_size, *args)` on every rank of a gloo group of real processes.

    Args:
        fn: a function at the top level of an importable module (the ranks import it).
        world_size: number of processes, at least 1.
        args: further arguments, picklable, the same for every rank.
        timeout: seconds for everything once the fork server has made its imports. Collectives give
            up after three quarters of it, so that a hang comes back as a traceback.
        init_process_group: False leaves the default group to `fn`: RANK, WORLD_SIZE, LOCAL_RANK,
            MASTER_ADDR and MASTER_PORT are set, as torchrun would.

    Returns:
        What each rank returned, in the order of ranks; it must be picklable (tensors are copied).

    Raises:
        RankError: a rank raised, ended or did not finish in time. No process is left behind.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        job = _Job(
            world_size=world_size,
            port=store.port,
            folder=folder,
            timeout=timeout,
            init_process_group=init_process_group,
        )
        with fork_server.changed_environment(fork_server.gloo_environment()):
            processes = [
                fork_server.make_process(
                    _rank_main,
                    rank,
                    job,
                    fn,
                    args,
                    name=f"rank {rank}",
                    output=job.path("output", rank),
                )
                for rank in range(world_size)
            ]
        try:
            for process in processes:
                process.start()
            _wait(processes, job)
        finally:
            for process in processes:
                fork_server.kill(process)
            for rank in range(world_size):
                sys.stderr.write(fork_server.read_output(job.path("output", rank)))
        return [pickle.loads(job.path("result", rank).read_bytes()) for rank in range(world_size)]


@dataclass(frozen=True, kw_only=True)
class _Job:
    world_size: int
    port: int
    folder: str
    timeout: float
    init_process_group: bool

    def path(self, kind: str, rank: int) -> Path:
        return Path(self.folder) / f"{kind}_{rank}"


def _rank_main(rank: int, job: _Job, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    stacks = open(job.path("stacks", rank), "w")  # noqa: SIM115  (open while the process lives)
    faulthandler.register(signal.SIGUSR1, file=stacks)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job.port),
        # The store already runs in the parent: rank 0 must not try to bind its port.
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    try:
        if job.init_process_group:
            dist.init_process_group(
                "gloo",
                rank=rank,
                world_size=job.world_size,
                timeout=datetime.timedelta(seconds=0.75 * job.timeout),
            )
            _wait_for_peers(rank, job)
        result = pickle.dumps(fn(rank, job.world_size, *args))
        job.path("result", rank).write_bytes(result)
    except BaseException:
        # Written before the group is destroyed: that makes the peers fail, and they must not
        # look as if they had failed first.
        report = (time.monotonic(), traceback.format_exc())
        job.path("error", rank).write_bytes(pickle.dumps(report))
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _wait_for_peers(rank: int, job: _Job) -> None:
    """Go on when every rank has its group; one that ended before would break its peers' start."""
    store = dist.TCPStore(
        "127.0.0.1",
        job.port,
        is_master=False,
        timeout=datetime.timedelta(seconds=0.75 * job.timeout),
    )
    store.set(f"initialized {rank}", "")
    store.wait([f"initialized {peer}" for peer in range(job.world_size)])


def _wait(processes: list[BaseProcess], job: _Job) -> None:
    """Return when every rank has ended well; else raise what happened to each that has not."""
    deadline = time.monotonic() + job.timeout
    timed_out = False
    running = list(processes)
    while running:
        ready = multiprocessing.connection.wait(
            [process.sentinel for process in running], timeout=deadline - time.monotonic()
        )
        if not ready:
            timed_out = True
            break
        ended = [process for process in running if process.sentinel in ready]
        running = [process for process in running if process.sentinel not in ready]
        for process in ended:
            process.join()
            if process.exitcode != 0:
                deadline = min(deadline, time.monotonic() + _PEERS_GRACE_S)
    failed = [process for process in processes if process not in running and process.exitcode]
    if failed or timed_out:
        raise _failure(processes, running, job)


def _failure(processes: list[BaseProcess], running: list[BaseProcess], job: _Job) -> RankError:
    """What every rank that failed or still runs has to say, the first failure first."""
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.5 if running else 0)

    reports: list[tuple[float, int, str]] = []
    for rank, process in enumerate(processes):
        error = job.path("error", rank)
        if error.exists():
            when, text = pickle.loads(error.read_bytes())
            reports.append((when, rank, f"rank {rank} of {job.world_size} failed:\n{text}"))
        elif process in running:
            stacks = job.path("stacks", rank)
            text = stacks.read_text() if stacks.exists() else ""
            title = f"rank {rank} of {job.world_size} had not finished"
            if len(running) == len(processes):
                title += f" after {job.timeout:g} s"
            reports.append((float("inf"), rank, f"{title}; it was at:\n{text or '(its start)'}"))
        elif process.exitcode:
            text = f"rank {rank} of {job.world_size} ended with exit code {process.exitcode}"
            reports.append((0.0, rank, text))
    reports.sort()
    return RankError("\n".join(text for _, _, text in reports), rank=reports[0][1])
