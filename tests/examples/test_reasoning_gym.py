"""The example of a pretrained model: its stages, and in the long variant what it promises.

Its short variant trains a tiny model with random weights over the same files, two pipeline ranks
and the same report; that a model learns the task is looked at by the long variant alone, which is
`bash examples/reasoning_gym.sh` (EXAMPLES=long, half an hour).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_prefix.config import RunConfig
from megatron_prefix.config.loader import load_dataclass, read_yaml
from megatron_prefix.training.surroundings import faults_of_surroundings
from tests.distributed import run_distributed
from tests.rollouts.servers import save_word_tokenizer
from tests.training.runs import read_rows, trainer

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "examples" / "reasoning_gym"
LONG = os.environ.get("EXAMPLES") == "long"

SENTENCE = ["State", "the", "final", "answer", "to", "following", "arithmetic", "problem:"]
NUMBERS = [str(n) for n in range(-100, 200)]
WORDS = [*SENTENCE, "=", "+", "-", ";", *NUMBERS, "?"]


@pytest.fixture
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reasoning_gym_report", EXAMPLE / "report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _values(folder: Path) -> dict[str, Any]:
    """The example's configuration with a tiny model, a tokenizer of words, and two steps."""
    values = read_yaml(EXAMPLE / "grpo.yaml")
    values["model"] |= {"vocab_size": len(WORDS), "rotary_base": 10000}
    values["model"]["transformer"] |= {
        **{"num_layers": 2, "hidden_size": 24, "num_attention_heads": 3, "num_query_groups": 1},
        **{"kv_channels": 8, "ffn_hidden_size": 32},
    }
    for section in ("rollouts", "evaluation"):
        values[section]["paths"] = [str(REPOSITORY / p) for p in values[section]["paths"]]
    values["rollouts"] |= {"groups_per_step": 4, "stop_tokens": [WORDS.index(";")]}
    values["rollouts"]["text"]["tokenizer"] = str(folder / "tokenizer")
    values["evaluation"] |= {"num_prompts": 6}
    values["training"] |= {"steps": 2, "timeout_minutes": 1}
    values["output"] = {
        "directory": str(folder / "run"),
        **{"save_last": False, "tensorboard": False, "plot": False, "samples": 0},
    }
    return values


def _train(rank: int, world_size: int, folder: Path) -> None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder / f"cache{rank}"
    with trainer(_values(folder)) as run:
        run.run()


def test_two_pipeline_ranks_train_on_the_tasks_and_the_report_pairs_them(
    tmp_path: Path, report: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    save_word_tokenizer(tmp_path / "tokenizer", WORDS, ";")
    run_distributed(_train, 2, tmp_path)
    rows = read_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    evaluations = tmp_path / "run" / "evaluations.jsonl"
    written = [json.loads(line) for line in evaluations.read_text().splitlines()]
    assert [len(row["rewards"]) for row in written] == [4] * 12
    assert {Path(row["source"]).name for row in written} == {
        f"unseen.gym.yaml:{i}" for i in range(6)
    }
    status = report.main([str(evaluations)])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["tasks"], found["steps"]) == (6, 2)
    assert found["before"] == pytest.approx(rows[0]["eval"])
    assert found["after"] == pytest.approx(rows[-1]["eval"])
    assert status == int(found["low"] <= 0)


def test_the_interval_is_that_of_the_differences(report: ModuleType) -> None:
    # By hand: differences 1, 0, 1, 0; mean 0.5, deviation sqrt(1/3), half 1.96 sqrt(1/12).
    before, after = (
        {"a": 0.0, "b": 1.0, "c": 0.0, "d": 0.5},
        {"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.5},
    )
    found = report.compare(before, after)
    assert (found["before"], found["after"], found["rise"]) == (0.375, 0.875, 0.5)
    assert found["low"] == pytest.approx(0.5 - 1.96 / 12**0.5)
    assert found["high"] == pytest.approx(0.5 + 1.96 / 12**0.5)


def test_the_example_is_right_but_for_the_model_that_it_makes(monkeypatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    config = load_dataclass(RunConfig, read_yaml(EXAMPLE / "grpo.yaml"))
    faults = faults_of_surroundings(config, rank=1)
    assert [
        fault for fault in faults if "outputs/reasoning_gym/model: there is no" not in fault
    ] == []


@pytest.mark.skipif(not LONG, reason="half an hour; set EXAMPLES=long")
@pytest.mark.timeout(3 * 3600)
def test_the_reward_of_a_pretrained_model_on_unseen_tasks_rises() -> None:
    done = subprocess.run(
        ["bash", "examples/reasoning_gym.sh"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert json.loads(done.stdout.splitlines()[-1])["low"] > 0
