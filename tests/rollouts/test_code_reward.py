"""The reward `code`: programs that pass the record's tests, and can do nothing else."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_prefix.rollouts.code.sandbox import NotIsolated, check_isolation, run_python
from megatron_prefix.rollouts.names import LIBRARY_REWARDS
from megatron_prefix.rollouts.user_process import CallFailed, UserFunction

try:
    check_isolation()
except NotIsolated as error:
    pytest.skip(f"programs cannot be isolated here: {error}", allow_module_level=True)


@pytest.fixture(scope="module")
def passes() -> Iterator[UserFunction]:
    function = UserFunction(LIBRARY_REWARDS["code"].function, processes=1, timeout_s=60)
    yield function
    function.close()


RIGHT = "It is\n```python\ndef square(x):\n    return x * x\n```\nas asked."
WRONG = RIGHT.replace("x * x", "x + x")
ECHO = "```py\nn = int(input())\nprint(*range(n))\n```"
PAIRS = {"inputs": ["3\n", "1"], "outputs": ["0 1 2\n", "0  \n\n"]}


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (RIGHT, "assert square(3) == 9", 1),
        (RIGHT, ["assert square(3) == 9", "assert square(-1) == 1"], 1),
        (RIGHT, '["assert square(3) == 9"]', 1),
        (WRONG, ["assert square(2) == 4", "assert square(3) == 9"], 0),
        ("def square(x): return x * x", "assert square(3) == 9", 1),
        (f"{WRONG}\nNo:\n{RIGHT}", "assert square(3) == 9", 1),
        (f"{RIGHT}\n```text\n9\n```", "assert square(3) == 9", 1),
        (f"{RIGHT}\nIt prints\n```\n9\n```", "assert square(3) == 9", 1),
        (RIGHT.replace("python", ""), "assert square(3) == 9", 1),
        (ECHO, PAIRS, 1),
        (ECHO, json.dumps(PAIRS), 1),
        (ECHO, {"inputs": ["3"], "outputs": ["0 1"]}, 0),
        ("print(0)\nimport sys\nsys.exit(1)", {"inputs": [""], "outputs": ["0"]}, 0),
        ("print(0)\nexit()", {"inputs": [""], "outputs": ["0"]}, 1),
        ("no program", "assert True", 0),
        ("", "assert True", 0),
        ("```java\nint x;\n```", "assert True", 0),
        ("```python\nexit()\n```", "assert False", 0),
        ("```python\nimport os\nos._exit(0)\n```", "assert False", 0),
        ("```python\nprint('\ud83d')\n```", "assert True", 0),
    ],
)
def test_a_response_is_right_where_its_program_passes_every_test(passes, response, answer, reward):
    assert passes("", response, answer) == {"value": reward}


@pytest.mark.parametrize(
    "answer",
    [None, 3, "", " ", [], [3], {}, {"inputs": ["1"], "outputs": []}, {**PAIRS, "fn_name": "f"}],
)
def test_an_answer_without_tests_is_refused(passes, answer):
    with pytest.raises(CallFailed, match=r"it runs tests: .*; answer is "):
        passes("", RIGHT, answer)


def test_a_program_finds_no_network(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        code = f"import socket\nsocket.create_connection({address!r}, 1)"
        assert not run_python(code, seconds=5).completed
        socket.create_connection(address, 1).close()  # it was there


def test_a_program_writes_to_its_own_folder_alone(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("here", encoding="utf-8")
    own = run_python("open('a', 'w').write('own')\nprint(open('a').read())", seconds=5)
    assert own.completed and own.output == "own\n"
    for code in (f"open({str(kept)!r}, 'w')", f"import shutil\nshutil.rmtree({str(tmp_path)!r})"):
        assert not run_python(code, seconds=5).completed
    # Mounts could be made writable again by who may mount.
    remount = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    remount += "assert libc.mount(b'none', b'/', None, 4096 | 32, None) == 0"
    nested = remount.replace("assert", "assert libc.unshare(0x10020000) == 0\nassert")
    for code in (remount, nested):
        assert not run_python(f"{code}\nopen({str(kept)!r}, 'w')", seconds=5).completed
    assert kept.read_text(encoding="utf-8") == "here"


def test_a_program_reaches_no_socket_among_the_files(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        server.listen()
        code = "import socket\nsocket.socket(socket.AF_UNIX).connect({path!r})"
        assert not run_python(code.format(path=str(tmp_path / "socket")), seconds=5).completed
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "socket"))  # it was there
    assert run_python("import socket\nsocket.socketpair()", seconds=5).completed


def test_a_program_starts_threads_and_no_processes() -> None:
    threads = "import threading\nthread = threading.Thread(target=print, args=(1,))\n"
    assert run_python(f"{threads}thread.start()\nthread.join()", seconds=5).output == "1\n"
    for code in ("import os\nos.fork()", "import subprocess\nsubprocess.run(['true'])"):
        assert not run_python(code, seconds=5).completed


def test_a_program_sees_neither_environment_nor_processes(monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    code = "import os\nprint(sorted(os.environ), os.listdir('/proc'), os.getpid())"
    assert run_python(code, seconds=5).output == (
        "['HOME', 'LANG', 'OMP_NUM_THREADS', 'PATH'] [] 1\n"
    )
    # It reaches no process but its own, and so this test goes on.
    run_python(f"import os\nos.kill({os.getpid()}, 9)", seconds=5)
    run_python("import os\nos.kill(-1, 9)", seconds=5)


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
        "import ctypes, os, time\nctypes.CDLL(None).prctl(1, 0)\nos.setsid()\ntime.sleep(60)",
        "text = 'a' * (3 << 30)",
        "print('a' * (1 << 28))",
    ],
)
def test_a_program_that_breaks_a_limit_has_not_passed_and_leaves_nothing(code: str) -> None:
    before = _children()
    started = time.monotonic()
    ran = run_python(code, seconds=1)
    assert not ran.completed and len(ran.output) <= 1 << 20
    assert time.monotonic() - started < 30
    while _children() - before:  # they are being ended
        assert time.monotonic() - started < 30, "processes are left"
        time.sleep(0.05)


def _children() -> set[str]:
    """Processes of programs that run."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"sandbox_main" in path.read_bytes():
                found.add(path.parent.name)
        except OSError:  # it has ended
            continue
    return found


def test_isolation_that_a_system_does_not_give_is_refused_by_name(monkeypatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(NotIsolated, match="on Linux alone"):
        check_isolation()
