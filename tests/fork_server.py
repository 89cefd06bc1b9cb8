"""New processes that need not import torch and Megatron, which takes each 5 to 9 s of a core.

A server process (multiprocessing's fork server, one for each process of pytest) imports them once
and does nothing else; every process of a test is a fork of it: a process of its own, of one thread,
that has not run any other test's code. What a fork shares with the others and a process that was
started by `python` does not: the seed of `hash(str)`, hence the order of sets. Tests that start
torchrun have ranks that differ in it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]


def ensure_running() -> None:
    """Start the server if it does not run. The first process of a test waits for its imports."""
    multiprocessing.set_forkserver_preload(["tests.preloaded"])
    with _environment_of_the_server():
        multiprocessing.forkserver.ensure_running()


def make_process(
    target: Callable[..., Any], *args: Any, name: str | None = None, output: Path | None = None
) -> BaseProcess:
    """A process to `start()`: it has this one's environment and folder, and ends with it.

    It leads a process group, so that `kill` also ends what it has started.

    Args:
        target: a function at the top level of an importable module.
        args: picklable.
        name: the process's name.
        output: file that gets stdout and stderr.
    """
    ensure_running()
    return multiprocessing.get_context("forkserver").Process(
        target=_main,
        args=(dict(os.environ), os.getcwd(), output, target, args),
        name=name,
    )


def kill(process: BaseProcess) -> None:
    """End a process and its process group, if it has been started and has not ended."""
    if process.pid is None:
        return
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # not yet the leader of its group
            process.kill()
    process.join()
    process.close()


def read_output(path: Path) -> str:
    """What a process has written to its `output`; nothing where it has not begun."""
    return path.read_text(errors="replace") if path.exists() else ""


def _main(
    environment: dict[str, str],
    folder: str,
    output: Path | None,
    target: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if output is not None:
        with output.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout.reconfigure(line_buffering=True)  # what is killed has printed it
    import numpy as np
    import torch

    # Forks begin with the same state; processes that seed nothing must not draw the same.
    np.random.seed()
    torch.set_num_threads(1)
    target(*args)


def _end_with_parent() -> None:
    """End this process when the one that asked for it is gone, even if it was killed."""
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)


@contextlib.contextmanager
def _environment_of_the_server() -> Iterator[None]:
    """What numpy and torch read when they are imported, and where the server finds `tests`."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        **gloo_environment(),
    }
    with changed_environment(settings):
        yield


@contextlib.contextmanager
def changed_environment(settings: dict[str, str]) -> Iterator[None]:
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def gloo_environment() -> dict[str, str]:
    """What a rank's environment needs besides its place."""
    settings = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if sys.platform == "linux":
        # Otherwise gloo looks up the host's name, which need not resolve.
        settings["GLOO_SOCKET_IFNAME"] = "lo"
    return settings
