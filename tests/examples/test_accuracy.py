"""The GSM8K example on its sample: grouped and ungrouped curves are one.

With a few small steps: how well a model learns the task is not looked at here.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_grouped_and_ungrouped_runs_have_the_same_accuracy(tmp_path, monkeypatch, capsys):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    arguments = [
        *("accuracy.py", str(EXAMPLES / "gsm8k"), "--output", str(tmp_path / "out")),
        *("--warm-start", "12", "training.steps=2", "rollouts.groups_per_step=4"),
        *("evaluation.num_prompts=8", "evaluation.every=1"),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    assert load_script("accuracy").main() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["example"] == "gsm8k"
    grouped, ungrouped = result["grouped"], result["ungrouped"]
    assert grouped["accuracy_before"] == ungrouped["accuracy_before"]
    assert grouped["accuracy_after"] == ungrouped["accuracy_after"]
    # 8 responses to each prompt, which is the larger part.
    assert grouped["tokens_computed"] < 0.6 * ungrouped["tokens_computed"]
    assert result["largest_difference_reward"] == 0
    # float64, additions in another order; Adam's first steps amplify rounding.
    assert result["largest_difference_entropy"] < 1e-9
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / "ungrouped" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [0, 1, 2]


def test_the_sample_is_what_the_script_writes(tmp_path):
    samples = load_script("make_samples")
    samples.write(tmp_path, samples.sums(), train=160, test=40)
    for name in ("train.jsonl", "test.jsonl"):
        shipped = (EXAMPLES / "gsm8k" / "sample" / name).read_text()
        assert shipped == (tmp_path / name).read_text()
        assert all(isinstance(json.loads(line)["answer"], str) for line in shipped.splitlines())
