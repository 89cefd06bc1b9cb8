"""The launch scripts, with real torchruns, on one machine and on two; their configurations."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_prefix.training.run_config import load_run_config
from tests import fork_server
from tests.examples.network_namespaces import Node, two_nodes
from tests.training.runs import TENSOR, good_records, run_values, write_config, write_records
from tests.training.survivors import Job, assert_same_checkpoint

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "examples" / "launch"
ENDLESS = 1_000_000
LONG = os.environ.get("SURVIVAL") == "long"


def _config(folder: Path, *, steps: int, parallel: dict[str, int] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    values = run_values(
        folder / "out",
        records=write_records(folder / "rollouts.jsonl", good_records(7)),
        parallel=parallel or {},
        training={"steps": steps},
        output={"save_every": 2},
    )
    return write_config(folder / "run.yaml", values)


def _steps_done(config: Path) -> int:
    metrics = config.parent / "out" / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


class Launcher:
    """A launch script that runs, its torchrun and its ranks."""

    def __init__(self, command: Sequence[str | Path], settings: dict[str, str], log: Path) -> None:
        self._log = log
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.process = psutil.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={
                **os.environ,
                "PATH": path,
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                "PYTHONWARNINGS": "ignore",
                "OMP_NUM_THREADS": "1",
                **settings,
            },
        )

    @property
    def output(self) -> str:
        """What the script, torchrun and all ranks have written."""
        return self._log.read_text(errors="replace")

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks that run now."""
        found = {}
        for child in self.process.children():
            with contextlib.suppress(psutil.Error, KeyError):
                found[int(child.environ()["RANK"])] = child
        return found

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to every process, as Slurm does."""
        for process in [self.process, *self.process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def end(self) -> None:
        """End whatever is left."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*self.process.children(recursive=True), self.process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()


@contextlib.contextmanager
def _launched(*launchers: Launcher) -> Iterator[None]:
    try:
        yield
    finally:
        for launcher in launchers:
            launcher.end()


def _wait_for_steps(config: Path, steps: int, *launchers: Launcher, timeout: float = 150) -> None:
    deadline = time.monotonic() + timeout
    while _steps_done(config) < steps:
        said = "\n".join(launcher.output for launcher in launchers)
        assert time.monotonic() < deadline, f"the run did not come that far:\n{said}"
        assert all(launcher.process.is_running() for launcher in launchers), said
        time.sleep(0.02)


def _kill_a_rank(config: Path, rank: int, launcher: Launcher, *others: Launcher) -> None:
    """Kill it, and wait until the run has gone on from its last checkpoint."""
    before = launcher.ranks()
    before[rank].send_signal(signal.SIGKILL)
    psutil.wait_procs(before.values(), timeout=60)
    reached = _steps_done(config)
    _wait_for_steps(config, reached + 3, launcher, *others)


def _assert_as_undisturbed(config: Path, *, ranks: int, parallel: dict[str, int]) -> None:
    """The last checkpoint is that of an undisturbed run of as many steps."""
    checkpoints = config.parent / "out" / "checkpoints"
    last = max(checkpoints.glob("step_??????"))
    steps = int(last.name.removeprefix("step_"))
    assert steps == _steps_done(config)
    expected = _config(config.parent / "expected", steps=steps, parallel=parallel)
    with Job(expected, ranks=ranks) as job:
        job.start()
        assert job.wait(timeout=180) == [0] * ranks, job.output(0)
    assert_same_checkpoint(last, expected.parent / "out" / "checkpoints" / last.name)


def test_torchrun_starts_killed_ranks_again_and_sigusr1_saves_and_ends_all_of_it_with_0(
    tmp_path: Path,
) -> None:
    config = _config(tmp_path / "run", steps=ENDLESS)
    kills = 20 if LONG else 1
    settings = {**fork_server.gloo_environment(), "PROCESSES": "2", "RESTARTS": str(kills)}
    launcher = Launcher(["bash", LAUNCH / "one_node.sh", config], settings, tmp_path / "log")
    with _launched(launcher):
        _wait_for_steps(config, 5, launcher)
        for _ in range(kills):
            time.sleep(random.uniform(0.0, 0.2))
            _kill_a_rank(config, random.randrange(2), launcher)
        launcher.signal_all(signal.SIGUSR1)
        assert launcher.process.wait(timeout=60) == 0, launcher.output
        assert "has got SIGUSR1: stopping after step" in launcher.output
    _assert_as_undisturbed(config, ranks=2, parallel={})


def _on(node: Node, *, rank: int, head: Node, config: Path, **settings: str) -> Launcher:
    log = config.parent / f"log_{rank}"
    values = {
        "NODES": "2",
        "NODE_RANK": str(rank),
        "NODE_ADDRESS": node.address,
        "HEAD_ADDRESS": head.address,
        "HEAD_PORT": "29500",  # nobody else is in the namespace
        "INTERFACE": node.interface,
        "RUN_ID": "test",
        **settings,
    }
    return Launcher(
        node.enter(["bash", str(LAUNCH / "several_nodes.sh"), str(config)]), values, log
    )


def test_two_machines_start_again_together_when_a_rank_of_one_is_killed_and_sigterm_saves(
    tmp_path: Path,
) -> None:
    config = _config(tmp_path / "run", steps=ENDLESS, parallel=TENSOR)
    settings = {"PROCESSES": "2", "RENDEZVOUS": "c10d", "RESTARTS": "1"}
    with two_nodes() as nodes:
        launchers = [
            _on(node, rank=rank, head=nodes[0], config=config, **settings)
            for rank, node in enumerate(nodes)
        ]
        with _launched(*launchers):
            _wait_for_steps(config, 5, *launchers)
            # Tensor parallel inside a machine, data parallel across.
            placed = [sorted(launcher.ranks()) for launcher in launchers]
            assert sorted(placed) == [[0, 1], [2, 3]]
            second = next(launcher for launcher in launchers if 2 in launcher.ranks())
            first = next(launcher for launcher in launchers if launcher is not second)
            _kill_a_rank(config, 3, second, first)
            for launcher in launchers:
                launcher.signal_all(signal.SIGTERM)
            # The ranks end with 0; torchrun reports that it was told to stop.
            codes = [launcher.process.wait(timeout=60) for launcher in launchers]
            assert codes == [1, 1], first.output + second.output
            assert "has got SIGTERM: stopping after step" in first.output
    _assert_as_undisturbed(config, ranks=4, parallel=TENSOR)


def test_two_machines_find_each_other_by_number_without_a_rendezvous_server(
    tmp_path: Path,
) -> None:
    config = _config(tmp_path / "run", steps=6)
    settings = {"PROCESSES": "1", "RENDEZVOUS": "static", "RESTARTS": "0"}
    with two_nodes() as nodes:
        launchers = [
            _on(node, rank=rank, head=nodes[0], config=config, **settings)
            for rank, node in enumerate(nodes)
        ]
        with _launched(*launchers):
            codes = [launcher.process.wait(timeout=150) for launcher in launchers]
            assert codes == [0, 0], launchers[0].output + launchers[1].output
    _assert_as_undisturbed(config, ranks=2, parallel={})


@pytest.mark.parametrize("script", ["one_node.sh", "several_nodes.sh"])
def test_a_setting_that_is_missing_is_named(script: str) -> None:
    settings = {
        name: value for name, value in os.environ.items() if name not in {"PROCESSES", "NODES"}
    }
    done = subprocess.run(
        ["bash", LAUNCH / script, "run.yaml"], capture_output=True, text=True, env=settings
    )
    assert done.returncode != 0
    missing = "PROCESSES" if script == "one_node.sh" else "NODES"
    assert f"{missing}: " in done.stderr


def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


PARAMETERS = {  # as their model cards say
    "qwen2.5-7b": 7.61e9,
    "llama-3.1-8b": 8.03e9,
    "qwen3-30b-a3b": 30.5e9,
}


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_the_configurations_load_and_describe_models_of_the_right_size(name: str) -> None:
    config = load_run_config(LAUNCH / f"{name}.yaml")
    assert _parameters(config.model.vocab_size, config.model.transformer) == pytest.approx(
        PARAMETERS[name], rel=3e-3
    )
    # Every rank of a packed row, and the experts, fit on the nodes that the file names.
    world = 8 if name == "qwen2.5-7b" else 16
    assert config.parallel.data_parallel_size(world) >= 2


def _parameters(vocab_size: int, t: dict[str, Any]) -> int:
    """Weights of a decoder with untied embeddings, without the few of norms and biases."""
    hidden, heads, groups = t["hidden_size"], t["num_attention_heads"], t["num_query_groups"]
    channels = t.get("kv_channels", hidden // heads)
    attention = hidden * channels * (2 * heads + 2 * groups)
    experts = t.get("num_moe_experts", 1)
    inner = t.get("moe_ffn_hidden_size", t["ffn_hidden_size"])
    router = hidden * experts if experts > 1 else 0
    mlp = 3 * hidden * inner * experts + router
    return 2 * vocab_size * hidden + t["num_layers"] * (attention + mlp)
