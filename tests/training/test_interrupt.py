"""Ctrl-C: a run saves and ends well, and does not wait for whoever presses it again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_prefix.checkpoints import files
from megatron_prefix.distributed import stop
from tests.training.runs import good_records, read_rows, run_values, write_config, write_records

ROOT = Path(__file__).resolve().parents[2]


def test_ctrl_c_saves_the_step_and_the_run_ends_well(tmp_path: Path) -> None:
    values = run_values(
        tmp_path / "out",
        records=write_records(tmp_path / "rollouts.jsonl", good_records(4)),
        training={"steps": 1_000_000},
        output={"save_every": 1_000},
    )
    process = subprocess.Popen(
        [
            *(sys.executable, "-W", "ignore", "-m", "megatron_prefix.training"),
            str(write_config(tmp_path / "run.yaml", values)),
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while len(read_rows(tmp_path / "out")) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        # As a terminal does it, and a launcher that passes it on.
        for _ in range(2):
            os.killpg(process.pid, signal.SIGINT)
        _, text = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, text
    done = read_rows(tmp_path / "out")[-1]["step"]
    assert files.complete_steps(tmp_path / "out" / "checkpoints") == [done]
    assert f"rank 0 has got SIGINT: stopping after step {done} of 1000000" in text
    assert f"ended after step {done} of 1000000: it was asked to stop" in text
    assert "Traceback" not in text


def test_a_later_ctrl_c_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop.StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == signal.SIGINT
        monkeypatch.setattr(stop, "_SAME_REQUEST_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
