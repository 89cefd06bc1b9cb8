"""A run of several ranks that are killed and started again, as a launcher would do it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_prefix.training import __main__ as command
from tests import fork_server


class Job:
    """Ranks of `python -m megatron_prefix.training config`, with what torchrun gives them.

    Used in a `with` block, of which no process is left.
    """

    def __init__(self, config: Path, *, ranks: int = 2) -> None:
        self.config = config
        self.ranks = ranks
        self.starts = 0
        self.processes: list[BaseProcess] = []
        self._store: dist.TCPStore | None = None

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill_all()

    def start(self) -> None:
        """Start every rank; what an earlier start has left has ended."""
        # A new one each time, as torchrun does: the old one holds addresses of those that ended.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.ranks):
            settings = {
                **fork_server.gloo_environment(),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": str(self.starts),
            }
            with fork_server.changed_environment(settings):
                process = fork_server.make_process(
                    _rank_main, self.config, name=f"rank {rank}", output=self._output(rank)
                )
                process.start()
            self.processes.append(process)
        self.starts += 1

    def output(self, rank: int) -> str:
        """What a rank has written since it was started last."""
        return fork_server.read_output(self._output(rank))

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank, and to nothing that it has started."""
        pid = self.processes[rank].pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def kill_all(self) -> None:
        """End what still runs."""
        for process in self.processes:
            fork_server.kill(process)
        self.processes.clear()

    def wait(self, timeout: float) -> list[int | None]:
        """The ranks' exit codes; None for those that do not end in time."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def wait_as_torchrun(self, timeout: float) -> list[int | None]:
        """The exit codes when a rank has failed and the others were asked to stop for it."""
        for _ in self.wait_until(timeout):
            pass
        for rank, process in enumerate(self.processes):
            if process.exitcode is None:
                self.signal(rank, signal.SIGTERM)
        return self.wait(timeout)

    @property
    def has_ended(self) -> bool:
        """Whether a rank has ended."""
        return any(process.exitcode is not None for process in self.processes)

    def wait_until(self, timeout: float) -> Iterator[None]:
        """Yield until a rank has ended; fail, with what ranks have written, after `timeout` s."""
        deadline = time.monotonic() + timeout
        while not self.has_ended:
            assert time.monotonic() < deadline, "\n".join(map(self.output, range(self.ranks)))
            yield
            time.sleep(0.002)

    def _output(self, rank: int) -> Path:
        return self.config.parent / f"output_{rank}"


def _rank_main(config: Path) -> None:
    sys.argv = ["training", str(config)]
    sys.exit(command.main())


def saved_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole: weights and the optimizer's state."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        name: torch.full(value.size, torch.nan, dtype=value.properties.dtype)
        for name, value in metadata.items()
        if isinstance(value, TensorStorageMetadata)
    }
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    """Every tensor of two checkpoints is the same, bit for bit."""
    left, right = saved_tensors(found), saved_tensors(expected)
    assert left.keys() == right.keys()
    assert any("exp_avg" in name for name in left), "the optimizer's state is compared, too"
    for name, tensor in right.items():
        assert torch.equal(left[name], tensor), name
