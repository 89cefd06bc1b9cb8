"""Python programs as processes of their own, with an exit status, stdout and stderr."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests import fork_server


def python_process(
    arguments: Sequence[str | os.PathLike[str]], *, stdout: Path, stderr: Path
) -> BaseProcess:
    """`python script.py ...` or `python -m module ...`, a fork of the tests' server to `start()`.

    It has this process's environment and folder, leads a process group and ends with this process
    (`tests/fork_server.py`). What depends on the interpreter's start (`-W`, `PYTHONHASHSEED`, what
    importing alone does) needs `subprocess`.
    """
    words = [os.fspath(argument) for argument in arguments]
    return fork_server.make_process(_run, words, stdout, output=stderr)


def run_python(
    arguments: Sequence[str | os.PathLike[str]], *, timeout: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """Run a `python_process` to its end.

    Raises:
        subprocess.TimeoutExpired: it and what it had started have been killed.
    """
    with tempfile.TemporaryDirectory(prefix="command_") as name:
        stdout, stderr = Path(name) / "stdout", Path(name) / "stderr"
        process = python_process(arguments, stdout=stdout, stderr=stderr)
        try:
            process.start()
            process.join(timeout)
            texts = fork_server.read_output(stdout), fork_server.read_output(stderr)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(list(arguments), timeout, *texts)
            return subprocess.CompletedProcess(list(arguments), process.exitcode, *texts)
        finally:
            fork_server.kill(process)


def _run(arguments: list[str], stdout: Path) -> None:
    with stdout.open("wb") as file:
        os.dup2(file.fileno(), 1)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")
