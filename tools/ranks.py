"""Fresh processes for tools that start their own, alone or finding each other as under torchrun.

They are forks of a server process that has imported torch and Megatron once and has run nothing. On
a machine with a GPU they import for themselves: CUDA does not survive the fork.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from megatron_prefix.megatron.known_messages import hide_known_messages


def fresh_processes(preload: Sequence[str] = ()) -> multiprocessing.context.BaseContext:
    """The context whose processes begin with their imports made; spawned where that cannot be.

    Args:
        preload: modules that are imported, too. Only the first call's are: it starts the server.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods() or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The server finds our package only where it is installed or in the current folder.
    context.set_forkserver_preload(
        [
            "megatron_prefix.megatron.hidden_messages",
            "megatron.core.models.gpt",
            "megatron.core.optimizer",
            "megatron_prefix.training.trainer",
            *preload,
        ]
    )
    return context


def run_ranks(
    function: Callable[..., None], world_size: int, *args: Any, preload: Sequence[str] = ()
) -> None:
    """Call `function(rank, *args)` in a new process for each rank, and wait for all.

    Args:
        function: at the top level of a module; it begins the process group.
        world_size: number of processes, of one thread each.
        args: picklable.
        preload: see `fresh_processes`.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; the others are ended.
    """
    # Bound before a rank starts, so that no other process can take its port.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.start_processes(
        _rank_main,
        args=(world_size, store.port, function, args),
        nprocs=world_size,
        start_method=fresh_processes(preload).get_start_method(),
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
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    hide_known_messages()
    torch.set_num_threads(1)
    function(rank, *args)
