"""A run whose attention kernel is wrong ends before its first step, on every rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prefix.attention.kernels.torch_cpu import TorchCpuKernel
from tests.distributed import run_distributed
from tests.training.runs import (
    good_records,
    read_rows,
    run_command,
    run_values,
    write_config,
    write_records,
)


def _run(rank: int, world_size: int, config: Path, wrong_rank: int, raises: bool):
    if rank != wrong_rank:
        return run_command(config)
    right = TorchCpuKernel.backward

    def wrong(*args, **kwargs):
        if raises:
            raise RuntimeError("no kernel image")
        return tuple(1.01 * share for share in right(*args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchCpuKernel, "backward", wrong)
        return run_command(config)


@pytest.mark.parametrize("raises", [False, True])
def test_one_wrong_rank_ends_all_with_its_kernels_name(tmp_path: Path, raises: bool) -> None:
    records = write_records(tmp_path / "records.jsonl", good_records(4))
    values = run_values(tmp_path / "out", records=records)
    config = write_config(tmp_path / "run.yaml", values)
    for status, stderr in run_distributed(_run, 2, config, 1, raises):
        assert status != 0
        assert "rank 1 of 2: attention kernel 'torch_cpu' " in stderr
        assert ("fails with RuntimeError: no kernel" if raises else "is off by 1.0e-02") in stderr
        assert "Set training.kernel" in stderr and "another: reference" in stderr
        assert "Traceback" not in stderr
    assert read_rows(tmp_path / "out") == []
