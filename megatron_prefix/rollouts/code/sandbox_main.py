"""Runs a Python program with limits, and without network, other processes or files to write to.

    python -I sandbox_main.py FOLDER DESCRIPTOR SECONDS

Started by `sandbox`; imports nothing but the standard library. The program comes as a JSON object
over the descriptor: `code` to run, `tests` to run behind it, and a `word` that is printed to the
descriptor `report` when all of that went well: a program that ends itself early does not get there.

Linux gives a process namespaces of its own. In them there is no network device, no process but the
program's, which all end with it, and every mount is read-only but a small one in memory at FOLDER.
/proc, which would show other processes and their environment, is empty.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from typing import NoReturn

_NEW_USER, _NEW_MOUNTS, _NEW_NETWORK = 0x10000000, 0x00020000, 0x40000000
_NEW_PROCESSES, _NEW_IPC = 0x20000000, 0x08000000
_PRIVATE, _RECURSIVE, _NO_SUID, _NO_DEVICES = 1 << 18, 1 << 14, 2, 4
_SYS_MOUNT_SETATTR, _THIS_FOLDER, _AT_RECURSIVE = 442, -100, 0x8000
_READ_ONLY = struct.pack("QQQQ", 1, 0, 0, 0)
_PR_SET_PDEATHSIG = 1

_MEMORY, _FILE, _FOLDER = 2 << 30, 16 << 20, b"size=64m"
_PROCESSES, _OPEN_FILES = 64, 256

NOT_ISOLATED = 77
"""Exit status where the system does not give the namespaces."""


def _system_call(name: str, result: int) -> None:
    if result:
        number = ctypes.get_errno()
        print(f"{name}: {os.strerror(number)}", file=sys.stderr, flush=True)
        os._exit(NOT_ISOLATED)


def _isolate(folder: str) -> None:
    """Leave the system's network, processes and writable mounts behind."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    spaces = _NEW_USER | _NEW_MOUNTS | _NEW_NETWORK | _NEW_PROCESSES | _NEW_IPC
    _system_call("unshare", libc.unshare(spaces))
    # In its own user namespace the process has the rights that mounting needs, and no others.
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
    _system_call("mount", libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None))
    attributes = (_THIS_FOLDER, b"/", _AT_RECURSIVE, _READ_ONLY, len(_READ_ONLY))
    _system_call("mount_setattr", libc.syscall(_SYS_MOUNT_SETATTR, *attributes))
    flags = _NO_SUID | _NO_DEVICES
    for place in (folder.encode(), b"/proc"):
        _system_call("mount", libc.mount(b"tmpfs", place, b"tmpfs", flags, _FOLDER))


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit(seconds: int) -> None:
    for kind, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_FSIZE, _FILE),
        (resource.RLIMIT_NPROC, _PROCESSES),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def _run(descriptor: int) -> NoReturn:
    """Run the program, as the first process of its namespace."""
    with open(descriptor, encoding="utf-8") as file:
        program = json.load(file)
    sys.argv = ["program.py"]
    names = {"__name__": "__main__", "__builtins__": __builtins__}
    exec(compile(program["code"], "program.py", "exec"), names)
    exec(compile(program["tests"], "tests.py", "exec"), names)
    sys.stdout.flush()
    os.write(program["report"], program["word"].encode())
    os._exit(0)


def main() -> None:
    """Isolate this process, and run the program in a child, which the namespace begins with."""
    folder, descriptor, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    _isolate(folder)
    _end_with_parent()
    child = os.fork()
    if child == 0:
        _end_with_parent()
        os.chdir(folder)
        _limit(seconds)
        _run(descriptor)
    _, status = os.waitpid(child, 0)
    sys.exit(0 if status == 0 else 1)


if __name__ == "__main__":
    main()
