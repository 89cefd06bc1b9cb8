"""Runs a Python program with limits, and without network, other processes or files to write to.

    python -I sandbox_main.py FOLDER CODE TESTS REPORT SECONDS

Started by `sandbox`; imports nothing but the standard library. CODE, TESTS and REPORT are file
descriptors: of the program, of what is run behind it, and of what then gets the last line of TESTS.
A program that ends itself early does not get there.

Linux gives a process namespaces of its own. In them there is no network device, no process but the
program's, which all end with it, and every mount is read-only but a small one in memory at FOLDER.
/proc, which would show other processes and their environment, and /run are empty. The program has
no capabilities, gains none, opens no sockets and starts no processes, but threads.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import NoReturn

_NEW_USER, _NEW_MOUNTS, _NEW_NETWORK = 0x10000000, 0x00020000, 0x40000000
_NEW_PROCESSES, _NEW_IPC = 0x20000000, 0x08000000
_MS_READ_ONLY, _NO_SUID, _NO_DEVICES, _RECURSIVE, _PRIVATE = 1, 2, 4, 1 << 14, 1 << 18
_SYS_MOUNT_SETATTR, _THIS_FOLDER, _AT_RECURSIVE = 442, -100, 0x8000
_READ_ONLY = struct.pack("QQQQ", 1, 0, 0, 0)
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
_CAPABILITIES_VERSION_3, _MOST_CAPABILITIES = 0x20080522, 64

_ARCHITECTURES = {"x86_64": (0xC000003E, (41, 57, 58), 56), "aarch64": (0xC00000B7, (198,), 220)}
"""By `platform.machine`: what a filter of system calls sees; the numbers of `socket`, `fork` and
`vfork`; and of `clone`."""
_CLONE3, _CLONE_THREAD = 435, 0x10000

_MEMORY, _FILE, _FOLDER = 2 << 30, 16 << 20, b"size=64m"
_THREADS, _OPEN_FILES = 64, 256

NOT_ISOLATED = 77
"""Exit status where the system does not isolate the program."""


def _refuse(reason: str) -> NoReturn:
    print(reason, file=sys.stderr, flush=True)
    os._exit(NOT_ISOLATED)


def _system_call(name: str, result: int) -> None:
    if result:
        _refuse(f"{name}: {os.strerror(ctypes.get_errno())}")


def _isolate(libc: ctypes.CDLL, folder: str) -> None:
    """Leave the system's network, processes and writable mounts behind."""
    user, group = os.getuid(), os.getgid()
    spaces = _NEW_USER | _NEW_MOUNTS | _NEW_NETWORK | _NEW_PROCESSES | _NEW_IPC
    _system_call("unshare", libc.unshare(spaces))
    # In its own user namespace the process has the rights that mounting needs.
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        Path(f"/proc/self/{name}").write_text(text, encoding="ascii")
    _system_call("mount", libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None))
    attributes = (_THIS_FOLDER, b"/", _AT_RECURSIVE, _READ_ONLY, len(_READ_ONLY))
    _system_call("mount_setattr", libc.syscall(_SYS_MOUNT_SETATTR, *attributes))
    flags = _NO_SUID | _NO_DEVICES
    _system_call("mount", libc.mount(b"tmpfs", folder.encode(), b"tmpfs", flags, _FOLDER))
    for place in (b"/proc", b"/run"):
        if os.path.isdir(place):
            empty = libc.mount(b"tmpfs", place, b"tmpfs", flags | _MS_READ_ONLY, None)
            _system_call("mount", empty)


def _give_up_rights(libc: ctypes.CDLL) -> None:
    """Keep no capability, with which mounts could be made writable again."""
    for capability in range(_MOST_CAPABILITIES):  # an error: there are not so many
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = struct.pack("Ii", _CAPABILITIES_VERSION_3, 0)
    _system_call("capset", libc.capset(header, bytes(24)))
    _system_call("no_new_privs", libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in _filter())
    kept = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(kept))
    _system_call("seccomp", libc.prctl(_PR_SET_SECCOMP, 2, program, 0, 0))


def _filter() -> list[tuple[int, int, int, int]]:
    """A filter of system calls: (operation, then, else, value), the two as instructions to skip.

    Sockets of other programs stand among the files, and to read a file is enough to connect. A
    limit on processes does not hold for the superuser, whom a container may run as.
    """
    architecture, refused, clone = _ARCHITECTURES[platform.machine()]
    load, if_equal, if_at_least, if_set, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, not_permitted, not_there, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    at_number, at_architecture, at_flags = 0, 4, 16
    return [
        (load, 0, 0, at_architecture),
        (if_equal, 1, 0, architecture),
        (answer, 0, 0, kill),
        (load, 0, 0, at_number),
        (if_at_least, 0, 1, 0x40000000),  # another set of numbers on the same machine
        (answer, 0, 0, kill),
        *(
            instruction
            for number in refused
            for instruction in ((if_equal, 0, 1, number), (answer, 0, 0, not_permitted))
        ),
        (if_equal, 0, 1, _CLONE3),  # whose flags a filter does not see; threads then use clone
        (answer, 0, 0, not_there),
        (if_equal, 0, 3, clone),
        (load, 0, 0, at_flags),
        (if_set, 1, 0, _CLONE_THREAD),
        (answer, 0, 0, not_permitted),
        (answer, 0, 0, allow),
    ]


def _limit(seconds: int) -> None:
    for kind, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_FSIZE, _FILE),
        (resource.RLIMIT_NPROC, _THREADS),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def _run(code: int, tests: int, report: int) -> NoReturn:
    """Run the program, as the first process of its namespace."""
    names = {"__name__": "__main__", "__builtins__": __builtins__}
    exec(compile(_text(code), "program.py", "exec"), names)
    # Read only now: no frame that the program sees has them.
    statements, _, word = _text(tests).rpartition("\n")
    exec(compile(statements, "tests.py", "exec"), names)
    sys.stdout.flush()
    os.write(report, word.encode())
    os._exit(0)


def _text(descriptor: int) -> str:
    with open(descriptor, encoding="utf-8", errors="surrogatepass") as file:
        return file.read()


def main() -> None:
    """Isolate this process, and run the program in a child, which the namespace begins with."""
    folder, code, tests, report, seconds = sys.argv[1], *map(int, sys.argv[2:])
    if platform.machine() not in _ARCHITECTURES:
        _refuse(f"{platform.machine()}: only x86_64 and aarch64 are known")
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getppid()
    try:
        _isolate(libc, folder)
    except OSError as error:
        _refuse(str(error))
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        _limit(seconds)
        _give_up_rights(libc)
        sys.argv = ["program.py"]
        _run(code, tests, report)

    def end(*_: object) -> None:
        # All processes of the namespace end with its first one, whatever they have done since.
        os.kill(child, signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, end)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        end()
    signal.alarm(seconds)
    _, status = os.waitpid(child, 0)
    os._exit(0 if status == 0 else 1)


if __name__ == "__main__":
    main()
