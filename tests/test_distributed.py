"""The helper that runs a function on real processes reports what happened to each of them."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankError, run_distributed


def _sum_over_ranks(rank: int, world_size: int, start: int) -> dict[str, object]:
    value = torch.tensor([start + rank])
    dist.all_reduce(value)
    return {"rank": rank, "sum": value, "pid": os.getpid(), "threads": torch.get_num_threads()}


def _one_rank_fails(rank: int, world_size: int) -> None:
    if rank == 1:
        raise KeyError("the item is missing")
    dist.barrier()


def _one_rank_sleeps(rank: int, world_size: int, folder: str) -> None:
    with open(os.path.join(folder, str(rank)), "w") as file:
        file.write(str(os.getpid()))
    if rank == 1:
        time.sleep(600)


def _group_from_environment(rank: int, world_size: int) -> list[int]:
    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    return [dist.get_rank(), dist.get_world_size()]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_come_back_in_the_order_of_ranks():
    results = run_distributed(_sum_over_ranks, 2, 10)
    assert [result["rank"] for result in results] == [0, 1]
    assert [result["sum"].item() for result in results] == [21, 21]
    assert [result["threads"] for result in results] == [1, 1]
    assert len({result["pid"] for result in results} | {os.getpid()}) == 3
    assert not any(_exists(result["pid"]) for result in results)


def test_a_failing_rank_is_named_with_its_traceback_and_its_peers_do_not_hang():
    with pytest.raises(RankError, match="rank 1 of 2 failed") as error:
        run_distributed(_one_rank_fails, 2)
    assert error.value.rank == 1
    assert "KeyError: 'the item is missing'" in str(error.value)
    assert "in _one_rank_fails" in str(error.value)


def test_a_rank_that_hangs_is_shown_where_it_hangs_and_killed(tmp_path):
    with pytest.raises(RankError, match="rank 1 of 2 had not finished") as error:
        run_distributed(_one_rank_sleeps, 2, str(tmp_path), timeout=20)
    assert error.value.rank == 1
    assert "in _one_rank_sleeps" in str(error.value)
    assert not any(_exists(int(path.read_text())) for path in tmp_path.iterdir())


def test_the_function_may_set_up_the_group_itself():
    assert run_distributed(_group_from_environment, 2, init_process_group=False) == [[0, 2], [1, 2]]
