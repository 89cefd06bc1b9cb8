"""What a run survives: killed ranks, a request to stop, a full disk, a damaged checkpoint.

Ranks run the real entry point. They are forks of the tests' server, so that many can be killed;
`tests/examples/test_launch.py` does the same to real torchruns.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_prefix.checkpoints import files as checkpoint_files
from megatron_prefix.distributed.stop import StopRequest
from megatron_prefix.training.trainer import Trainer
from tests.distributed import run_distributed
from tests.small_disk import SmallDisk
from tests.training.runs import (
    good_records,
    read_rows,
    run_values,
    trainer,
    write_config,
    write_records,
)
from tests.training.survivors import Job, assert_same_checkpoint

STEPS = 90
SAVE_EVERY = 2
KILLS = 20


def _config(folder: Path, *, steps: int = STEPS, **output: Any) -> Path:
    """A run of two data-parallel ranks whose learning rate, data and weights change in each step.

    Its random states matter where a model draws; this one does not, and `test_checkpoint` has them.
    """
    folder.mkdir(exist_ok=True)
    records = write_records(folder / "rollouts.jsonl", good_records(7))
    values = run_values(
        folder / "out",
        records=records,
        training={"steps": steps},
        optimizer={"lr": 1e-2, "lr_decay_style": "cosine", "weight_decay": 0.1},
        output={"save_every": SAVE_EVERY, **output},
    )
    return write_config(folder / "run.yaml", values)


def _checkpoints(config: Path) -> Path:
    return config.parent / "out" / "checkpoints"


def _rows(config: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on time."""
    return [
        {name: value for name, value in row.items() if "second" not in name}
        for row in read_rows(config.parent / "out")
    ]


def _steps_done(config: Path) -> int:
    metrics = config.parent / "out" / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run that nothing has happened to."""
    config = _config(tmp_path_factory.mktemp("survival") / "undisturbed")
    _run_to_the_end(config)
    return config


def _run_to_the_end(config: Path) -> str:
    """Run until the last step; returns what rank 0 wrote."""
    with Job(config) as job:
        job.start()
        assert job.wait(timeout=180) == [0, 0], job.output(0) + job.output(1)
        return job.output(0)


def _assert_same_run(config: Path, undisturbed: Path) -> None:
    last = f"step_{STEPS:06d}"
    assert_same_checkpoint(_checkpoints(config) / last, _checkpoints(undisturbed) / last)
    assert _rows(config) == _rows(undisturbed)


def test_a_run_killed_at_twenty_random_instants_ends_with_the_weights_of_an_undisturbed_one(
    undisturbed: Path, tmp_path: Path
) -> None:
    config = _config(tmp_path / "killed")
    chance = random.Random(5)
    newest, cut_off = 0, 0
    with Job(config) as job:
        for kill in range(KILLS):
            job.start()
            _wait_for_an_instant(job, kill, chance)
            assert not job.has_ended, job.output(0) + job.output(1)
            lost = chance.randrange(2)
            job.signal(lost, signal.SIGKILL)
            if kill % 7 == 3:  # as torchrun ends the others
                job.signal(1 - lost, signal.SIGTERM)
                codes = job.wait(timeout=60)
                assert codes[lost] == -signal.SIGKILL and codes[1 - lost] in (1, -signal.SIGTERM)
            job.kill_all()
            steps = checkpoint_files.complete_steps(_checkpoints(config))
            for step in steps:
                found = checkpoint_files.damage(
                    checkpoint_files.step_path(_checkpoints(config), step)
                )
                assert found is None
            assert max(steps, default=0) >= newest
            newest = max(steps, default=0)
            cut_off += any(_checkpoints(config).glob("*.partial"))
        job.start()
        assert job.wait(timeout=180) == [0, 0], job.output(0) + job.output(1)
    assert cut_off > 0, "no kill has met a checkpoint that was being written"
    assert not list(_checkpoints(config).glob("*.damaged"))
    _assert_same_run(config, undisturbed)


def _wait_for_an_instant(job: Job, kill: int, chance: random.Random) -> None:
    """By turns: somewhere in the writing of a checkpoint, in a step, or at any time at all."""
    before = _steps_done(job.config)
    partials = set(_checkpoints(job.config).glob("*.partial"))
    end_of_wait = time.monotonic() + chance.uniform(0.0, 4.0)
    for _ in job.wait_until(timeout=120):
        now = _steps_done(job.config)
        if kill % 5 in (0, 2):
            if set(_checkpoints(job.config).glob("step_*.partial")) - partials:
                time.sleep(chance.uniform(0.0, 0.06))
                return
        elif kill % 5 in (1, 3):
            # A run that continues drops the rows of steps that it takes again.
            if now != before and now % SAVE_EVERY:
                time.sleep(chance.uniform(0.0, 0.1))
                return
        elif time.monotonic() > end_of_wait or now > before + SAVE_EVERY:
            return


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_run_that_one_rank_is_asked_to_stop_saves_ends_well_and_continues_bit_for_bit(
    number: signal.Signals, undisturbed: Path, tmp_path: Path
) -> None:
    config = _config(tmp_path / "stopped", save_every=0)
    with Job(config) as job:
        job.start()
        for _ in job.wait_until(timeout=120):
            if _steps_done(config) >= 5:
                break
        job.signal(1, number)
        asked = time.monotonic()
        assert job.wait(timeout=60) == [0, 0], job.output(0) + job.output(1)
        assert time.monotonic() - asked < 25  # torchrun kills after 30 s
        assert f"rank 1 has got {number.name}: stopping after step" in job.output(0)
    assert checkpoint_files.complete_steps(_checkpoints(config)) == [_steps_done(config)]
    assert _steps_done(config) < STEPS
    _run_to_the_end(config)
    _assert_same_run(config, undisturbed)


def test_a_whole_process_group_that_is_asked_to_stop_while_it_writes_loses_nothing(
    undisturbed: Path, tmp_path: Path
) -> None:
    """As Slurm signals a step: the ranks, and whatever they have started."""
    config = _config(tmp_path / "stopped")
    with Job(config) as job:
        job.start()
        for _ in job.wait_until(timeout=120):
            if list(_checkpoints(config).glob("step_*.partial")):
                break
        for process in job.processes:
            os.killpg(process.pid, signal.SIGTERM)
        assert job.wait(timeout=60) == [0, 0], job.output(0) + job.output(1)
    assert max(checkpoint_files.complete_steps(_checkpoints(config))) == _steps_done(config)
    _run_to_the_end(config)
    _assert_same_run(config, undisturbed)


def test_what_a_killed_rank_was_writing_with_ends_with_it(tmp_path: Path) -> None:
    config = _config(tmp_path / "killed")
    with Job(config) as job:
        job.start()
        writers: list[psutil.Process] = []
        for _ in job.wait_until(timeout=120):
            writers = psutil.Process(job.processes[0].pid).children(recursive=True)
            if writers:
                break
        job.signal(0, signal.SIGKILL)
        _, alive = psutil.wait_procs(writers, timeout=10)
        assert writers and not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


WRITERS = ["writer"]
if hasattr(FileSystemWriterAsync, "write_preloaded_data_multiproc"):
    WRITERS.append("process of one file")  # from Megatron-Core 0.17 on it is a thread of the writer


@pytest.mark.parametrize("which", WRITERS)
def test_a_writer_that_is_killed_ends_the_run_with_an_error_and_the_last_checkpoint_whole(
    which: str, tmp_path: Path
) -> None:
    config = _config(tmp_path / "out_of_memory", steps=1_000_000)
    with Job(config) as job:
        job.start()
        for _ in job.wait_until(timeout=120):
            if checkpoint_files.complete_steps(_checkpoints(config)) and _kill_a_writer(job, which):
                break
        assert job.wait_as_torchrun(timeout=60)[0] == 1
        error = f"error: {_checkpoints(config)}/step_"
        assert error in job.output(0) and "a writing process ended with exit code" in job.output(0)
    steps = checkpoint_files.complete_steps(_checkpoints(config))
    assert steps and not list(_checkpoints(config).glob("*.partial"))
    for step in steps:
        path = checkpoint_files.step_path(_checkpoints(config), step)
        assert checkpoint_files.damage(path) is None


def _kill_a_writer(job: Job, which: str) -> bool:
    """Kill what writes, if something does now."""
    rank = psutil.Process(job.processes[0].pid)
    try:
        for process in rank.children(recursive=which != "writer"):
            if which == "writer" or process.ppid() != rank.pid:
                process.suspend()  # or it has written before it is killed
                time.sleep(0.2)
                process.kill()
                return True
    except psutil.NoSuchProcess:
        pass
    return False


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A file system that holds two checkpoints, and no third one."""
    with SmallDisk(tmp_path / "disk", 2**20) as disk:
        yield disk


def test_a_full_disk_ends_the_run_with_an_error_and_it_continues_when_there_is_room(
    undisturbed: Path, small_disk: SmallDisk, tmp_path: Path
) -> None:
    config = _config(tmp_path / "full", directory=str(small_disk.path / "out"), keep=100)
    with Job(config) as job:
        job.start()
        assert job.wait_as_torchrun(timeout=120)[0] == 1, job.output(0)
        errors = [line for line in job.output(0).splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert errors[0].startswith(f"error: {small_disk.path}/out/checkpoints/step_")
        assert "could not be written" in errors[0] and "No space left on device" in errors[0]
    checkpoints = small_disk.path / "out" / "checkpoints"
    steps = checkpoint_files.complete_steps(checkpoints)
    assert steps and steps == list(range(2, 2 * len(steps) + 1, 2))
    for step in steps:
        assert checkpoint_files.damage(checkpoint_files.step_path(checkpoints, step)) is None

    small_disk.resize(100 * 2**20)
    assert f"{steps[-1]}/{STEPS}" in _run_to_the_end(config)
    last = f"step_{STEPS:06d}"
    assert_same_checkpoint(checkpoints / last, _checkpoints(undisturbed) / last)


@pytest.fixture
def finished(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of the undisturbed run, which may be spoilt."""
    config = _config(tmp_path / "copy")
    shutil.copytree(undisturbed.parent / "out", config.parent / "out")
    return config


def _weights(config: Path, step: int) -> Path:
    path = checkpoint_files.step_path(_checkpoints(config), step)
    return max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)


@pytest.mark.parametrize("spoil", ["cut", "remove", "state"])
def test_a_checkpoint_that_has_lost_a_part_is_named_and_set_aside_for_the_one_before_it(
    spoil: str, finished: Path, undisturbed: Path
) -> None:
    file = _weights(finished, STEPS)
    if spoil == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif spoil == "remove":
        file.unlink()
    else:
        file = file.with_name("trainer.json")
        os.truncate(file, 10)
    output = _run_to_the_end(finished)
    assert f"step_{STEPS:06d}: {file.name} " in output and "renamed to .damaged" in output
    assert (_checkpoints(finished) / f"step_{STEPS:06d}.damaged").is_dir()
    _assert_same_run(finished, undisturbed)


def test_without_a_whole_checkpoint_a_run_refuses_to_begin_and_touches_nothing(
    finished: Path,
) -> None:
    for step in checkpoint_files.complete_steps(_checkpoints(finished)):
        _weights(finished, step).unlink()
    before = sorted(finished.parent.rglob("out/**/*"))
    assert "no checkpoint is whole to continue from" in _fails(finished)
    assert sorted(finished.parent.rglob("out/**/*")) == before


def test_a_checkpoint_of_right_size_and_wrong_content_is_named_and_the_next_step_said(
    finished: Path,
) -> None:
    file = _weights(finished, STEPS)
    file.write_bytes(bytes(file.stat().st_size))
    error = _fails(finished)
    assert f"step_{STEPS:06d}: cannot be read: " in error and "move it away" in error


def _fails(config: Path) -> str:
    """Run, which has to end with one error of both ranks; returns it."""
    with Job(config) as job:
        job.start()
        assert job.wait_as_torchrun(timeout=120)[0] == 1, job.output(0)
        errors = [line for line in job.output(0).splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in job.output(0)
        return errors[0]


def test_rollouts_that_were_made_when_the_run_was_stopped_are_trained_on_when_it_continues(
    tmp_path: Path,
) -> None:
    (found,) = run_distributed(_stop_between_rollouts_and_step, 1, tmp_path)
    made_before, made_after, stopped_at, rows = found
    assert (made_before, stopped_at) == (3, 2)  # the third batch was made and not trained on
    assert made_after == 1  # and not made again: the fourth is what the other run still makes
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    ((_, _, _, expected),) = run_distributed(
        _stop_between_rollouts_and_step, 1, tmp_path, "undisturbed"
    )
    assert _without_times(rows) == _without_times(expected)


def _stop_between_rollouts_and_step(
    rank: int, world_size: int, folder: Path, name: str = "stopped"
) -> tuple[int, int, int, list[dict[str, Any]]]:
    values = run_values(
        folder / name,
        records=write_records(folder / "rollouts.jsonl", good_records(7)),
        training={"steps": 4},
        output={"save_every": 1},
    )
    with trainer(values) as first, StopRequest() as stop:
        first._stop = stop
        made_before = _count_batches(first, stop_at=3 if name == "stopped" else None)
        first.run()
    made_after, stopped_at = [], first.step
    if name == "stopped":
        with trainer(values) as second:
            made_after = _count_batches(second, stop_at=None)
            second.run()
    return len(made_before), len(made_after), stopped_at, read_rows(folder / name)


def _count_batches(of: Trainer, *, stop_at: int | None) -> list[int]:
    """Note the batches that the engine makes; after one of them this process gets SIGTERM."""
    made: list[int] = []
    next_rollouts = of.engine.next_rollouts

    def counted(num_groups: int, *, step: int) -> Any:
        batch = next_rollouts(num_groups, step=step)
        made.append(step)
        if len(made) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    of.engine.next_rollouts = counted  # type: ignore[method-assign]
    return made


def _without_times(rows: list[dict[str, Any]]) -> str:
    kept = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    return json.dumps(kept)
