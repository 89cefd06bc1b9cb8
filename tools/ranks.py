"""Fresh processes that find each other as under torchrun, for tools that start their own."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., None], world_size: int, *args: Any) -> None:
    """Call `function(rank, *args)` in a new process for each rank, and wait for all.

    Args:
        function: at the top level of a module; it begins the process group.
        world_size: number of processes, of one thread each.
        args: picklable.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; the others are ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(
        _rank_main, args=(world_size, port, function, args), nprocs=world_size, start_method="spawn"
    )


def _rank_main(
    rank: int, world_size: int, port: int, function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    function(rank, *args)
