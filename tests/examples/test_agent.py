"""The agent example: a task of two turns with a tool, learned on the rollouts of a real server.

The runs are those of `python -m megatron_prefix.training`, in this process.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_prefix.config.loader import read_yaml
from tests.rollouts.servers import END, transformers_server
from tests.training.runs import read_rows, trainer

FOLDER = Path(__file__).parents[2] / "examples" / "agent"


@pytest.fixture
def make_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("agent_make_data", FOLDER / "make_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # The environment's processes look modules up where this process does.
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])


def _values(name: str, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A configuration of the example, with the test's folders."""
    values = read_yaml(FOLDER / name)
    for section in ("rollouts", "evaluation"):
        if section in values:
            values[section]["paths"] = [str(data / Path(p).name) for p in values[section]["paths"]]
    values["rollouts"]["text"]["tokenizer"] = str(data / "tokenizer")
    values["output"] = {"directory": str(output), "tensorboard": False, "plot": False, **changes}
    return values


def test_an_agent_learns_to_use_its_tool_and_a_broken_tool_costs_its_own_responses(
    tmp_path: Path, make_data: ModuleType
) -> None:
    data = tmp_path / "data"
    make_data.main([str(data)])
    with trainer(_values("warm_start.yaml", data, tmp_path / "warm_start")) as run:
        run.run()
    load = str(tmp_path / "warm_start" / "checkpoints")
    with transformers_server(tmp_path / "log") as server:
        values = _values("grpo.yaml", data, tmp_path / "grpo", load=load, save_last=False)
        values["rollouts"]["server"]["url"] = server.url
        with trainer(values) as run:
            run.run()
        rows = read_rows(tmp_path / "grpo")
        # One shelf of two, one answer of three; on pairs of shelves that no run has seen.
        assert rows[0]["eval"] <= 0.3
        assert rows[-1]["eval"] >= 0.8
        assert {row["environment_failures"] for row in rows[1:]} == {0.0}
        assert {rows[i]["eval_environment_failures"] for i in (0, -1)} == {0.0}
        assert rows[-1]["turns"] > 1.9

        values["output"]["directory"] = str(tmp_path / "broken")
        values["training"]["steps"] = 1
        agent = {"environment": "tests.examples.broken_tool:lookup", "turn_timeout_s": 1.0}
        values["rollouts"]["agent"] |= {**agent, "on_failure": -1.0}
        with trainer(values) as run:
            _check_failures(run)
            run.run()
        first, last = read_rows(tmp_path / "broken")
        assert first["eval_environment_failures"] > 0
        assert last["unfinished_responses"] >= last["environment_failures"] > 0


def _check_failures(run: Any) -> None:
    """Responses that opened a broken shelf have failed, and no others."""
    from tests.examples.broken_tool import is_broken

    batch = run.engine.next_rollouts(10, step=0)
    failed = []
    for group in batch.groups():
        assert len(group.responses) == run.config.rollouts.group_size
        for i, (response, mask) in enumerate(zip(group.responses, group.loss_mask, strict=True)):
            turn = response[: len(mask) if mask.all() else mask.argmin()].tolist()
            # A digit and the end of the turn.
            opened = str(turn[0]) if turn[1:] == [END] else ""
            failed.append(is_broken(opened, group.answer))
            assert group.rewards[i] == -1 if failed[-1] else group.rewards[i] in (0, 1)
            assert not (failed[-1] and group.finished[i])
    assert run.engine.metrics()["environment_failures"] == sum(failed) > 0
    assert not all(failed)
