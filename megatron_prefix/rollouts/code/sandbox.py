"""Programs that a model wrote, each in a process of its own with limits (see `sandbox_main`)."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron_prefix.rollouts.code.sandbox_main import NOT_ISOLATED

_MAIN = Path(__file__).with_name("sandbox_main.py")
_MOST_OUTPUT = 1 << 20
"""Bytes of a program's output that are looked at."""
_TO_START_S = 30
"""For the process that ends the program at its limit: it may wait for a core."""


class NotIsolated(RuntimeError):
    """The system does not let this process isolate a program."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """How a program ended."""

    succeeded: bool
    """It ended by itself, in time and with status 0."""
    completed: bool
    """It also ran to its last line, and all tests behind it."""
    output: str
    """What it printed, 1 MiB at most."""


def run_python(code: str, *, tests: str = "", stdin: str = "", seconds: int) -> Ran:
    """Run a program without network, in a folder that is gone afterwards.

    It can read the files that this user can, and write 64 MiB to its folder. It has 2 GiB of
    memory, starts no processes, and has no environment variables but those of its language.

    Args:
        code: Python, run as a script is.
        tests: run behind the code, with its names. They are in the code's process: it could be
            written to deceive them.
        stdin: what the program reads.
        seconds: of computing, and of time that goes by.

    Raises:
        NotIsolated: the system does not isolate it.
    """
    word = secrets.token_hex(16)
    folder = _folder()
    with (
        _file(stdin) as given,
        _file(code) as source,
        _file(f"{tests}\n{word}") as behind,
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
        tempfile.TemporaryFile() as report,
    ):
        descriptors = [file.fileno() for file in (source, behind, report)]
        process = subprocess.Popen(
            [sys.executable, "-I", _MAIN, folder, *map(str, descriptors), str(seconds)],
            stdin=given,
            stdout=output,
            stderr=errors,
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "HOME": folder},
            pass_fds=descriptors,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds + _TO_START_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        if status == NOT_ISOLATED:
            raise NotIsolated(_read(errors).strip())
        return Ran(succeeded=status == 0, completed=_read(report) == word, output=_read(output))


def check_isolation() -> None:
    """See whether programs can be isolated here.

    Raises:
        NotIsolated: they cannot, with the reason.
    """
    if not sys.platform.startswith("linux"):
        raise NotIsolated("programs can be kept apart on Linux alone")
    if not run_python("", seconds=60).completed:
        raise NotIsolated("a program that does nothing did not end well")


def _folder() -> str:
    """An empty folder of this user's, which every program has its own file system at."""
    folder = Path(tempfile.gettempdir(), f"megatron_prefix-programs-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise NotIsolated(f"{folder}: is no folder of this user; remove it")
    return str(folder)


def _file(text: str) -> tempfile._TemporaryFileWrapper[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    file.write(text.encode("utf-8", "surrogatepass"))
    file.seek(0)
    return file


def _read(file: tempfile._TemporaryFileWrapper[bytes]) -> str:
    file.seek(0)
    return file.read(_MOST_OUTPUT).decode("utf-8", "replace")
