"""The helpers that run functions and programs on real processes report what happened to each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.commands import run_python
from tests.distributed import RankError, run_distributed


def _sum_over_ranks(rank: int, world_size: int, start: int) -> dict[str, object]:
    value = torch.tensor([start + rank])
    dist.all_reduce(value)
    return {
        "rank": rank,
        "sum": value,
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "draw": np.random.random(),
        "folder": os.getcwd(),
        "variable": os.environ.get("OF_THIS_TEST"),
        "imported": "megatron_prefix.training.trainer" in sys.modules,
    }


def _one_rank_fails(rank: int, world_size: int) -> None:
    print(f"rank {rank} says something")
    if rank == 1:
        raise KeyError("the item is missing")
    dist.barrier()


def _one_rank_sleeps(rank: int, world_size: int, folder: str) -> None:
    with open(os.path.join(folder, str(rank)), "w") as file:
        file.write(str(os.getpid()))
    print(f"rank {rank} says something")
    if rank == 1:
        time.sleep(600)


def _one_rank_is_killed(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def _group_from_environment(rank: int, world_size: int) -> list[int]:
    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    return [dist.get_rank(), dist.get_world_size()]


def _exists(pid: int) -> bool:
    """Whether a process runs; one that nobody has reaped does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_results_come_back_in_the_order_of_ranks_and_processes_are_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = run_distributed(_sum_over_ranks, 2, 10)
    monkeypatch.setenv("OF_THIS_TEST", "3")
    monkeypatch.chdir(tmp_path)
    later = run_distributed(_sum_over_ranks, 2, 20)
    assert [result["rank"] for result in results + later] == [0, 1, 0, 1]
    assert [result["sum"].item() for result in results + later] == [21, 21, 41, 41]
    assert {result["threads"] for result in results + later} == {1}
    assert len({result["pid"] for result in results + later} | {os.getpid()}) == 5
    assert not any(_exists(result["pid"]) for result in results + later)
    assert len({result["draw"] for result in results + later}) == 4
    assert [result["variable"] for result in results + later] == [None, None, "3", "3"]
    assert later[0]["folder"] == str(tmp_path) != results[0]["folder"]
    # Otherwise the fork server's imports have failed, and every rank takes seconds for its own.
    assert all(result["imported"] for result in results)


def test_a_failing_rank_is_named_with_its_traceback_and_its_peers_do_not_hang(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(RankError, match="rank 1 of 2 failed") as error:
        run_distributed(_one_rank_fails, 2)
    assert error.value.rank == 1
    assert "KeyError: 'the item is missing'" in str(error.value)
    assert "in _one_rank_fails" in str(error.value)
    assert "rank 0 says something\nrank 1 says something" in capfd.readouterr().err


def test_a_rank_that_hangs_is_shown_where_it_hangs_and_killed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RankError, match="rank 1 of 2 had not finished") as error:
        run_distributed(_one_rank_sleeps, 2, str(tmp_path), timeout=8)
    assert error.value.rank == 1
    assert "in _one_rank_sleeps" in str(error.value)
    assert "rank 1 says something" in capfd.readouterr().err
    assert not any(_exists(int(path.read_text())) for path in tmp_path.iterdir())


def test_a_rank_that_is_killed_is_named_and_the_next_ranks_are_whole() -> None:
    with pytest.raises(RankError, match="rank 1 of 2 ended with exit code -9") as error:
        run_distributed(_one_rank_is_killed, 2)
    assert error.value.rank == 1
    assert [result["sum"].item() for result in run_distributed(_sum_over_ranks, 2, 1)] == [3, 3]


def test_the_function_may_set_up_the_group_itself() -> None:
    assert run_distributed(_group_from_environment, 2, init_process_group=False) == [[0, 2], [1, 2]]


SCRIPT = """
import os, subprocess, sys, time
import beside
print("argv", sys.argv[1:], beside.VALUE)
print("to stderr", file=sys.stderr)
if __name__ == "__main__" and sys.argv[1:] == ["sleep"]:
    child = subprocess.Popen(["sleep", "600"])
    print("pid", child.pid)
    time.sleep(600)
sys.exit(3)
"""


def test_a_program_has_its_exit_status_its_output_and_an_end(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    done = run_python([tmp_path / "program.py", "a", "b"])
    assert (done.returncode, done.stdout) == (3, "argv ['a', 'b'] 7\n")
    assert done.stderr == "to stderr\n"
    with pytest.raises(subprocess.TimeoutExpired) as late:
        run_python([tmp_path / "program.py", "sleep"], timeout=5)
    assert not _exists(int(late.value.output.split("pid ")[1]))


def test_a_module_runs_as_a_program() -> None:
    done = run_python(["-m", "megatron_prefix.training", "missing.yaml"])
    assert done.returncode == 2
    assert "missing.yaml" in done.stderr and done.stdout == ""
