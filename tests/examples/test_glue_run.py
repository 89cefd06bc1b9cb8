"""The GLUE example from a Hugging Face folder to its scores, with a small random model.

How well a model learns the tasks is not looked at here.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tests.conversion.models import write_model
from tests.rollouts.chat_templates import save_chat_tokenizer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "glue"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """examples/glue/run.py, as from the command line."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLE), *sys.path])
    spec = importlib.util.spec_from_file_location("glue_run", EXAMPLE / "run.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "glue_run", script)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    return script.main()


def test_grouped_and_ungrouped_runs_have_the_same_scores(tmp_path, monkeypatch, capsys) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    model = write_model(tmp_path / "hf", "llama", vocab_size=320, max_position_embeddings=1024)
    save_chat_tokenizer(model, "chatml")
    arguments = [
        *(str(model), "--output", str(tmp_path / "out"), "--tasks", "STS-B,CB"),
        *("training.steps=2", "training.dtype=float64", "rollouts.groups_per_step=4"),
        *("optimizer.lr=1.0e-3", "rollouts.max_response_length=16"),
    ]
    assert run(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    assert "GLUE/STS-B pearson" in printed
    assert "SuperGLUE average, without BoolQ, COPA, MultiRC, ReCoRD, RTE, WiC, WSC" in printed
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["grouped"] == result["ungrouped"]
    assert result["grouped"].keys() == {
        *("GLUE/STS-B", "SuperGLUE/CB", "GLUE", "SuperGLUE", "responses_with_an_answer")
    }
    comparison = result["comparison"]
    assert comparison["same_responses"] == comparison["responses"] == 12
    # The policy was trained, and not on rewards that are all the same.
    assert comparison["changed_by_training"] > 0
    rows = (tmp_path / "out" / "grouped" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]
    assert all(json.loads(row)["grad_norm"] > 0 for row in rows)
    assert comparison["largest_difference_reward"] == 0
    # float64, additions in another order; Adam's first steps amplify rounding.
    assert comparison["largest_difference_entropy"] < 1e-9
    # 8 responses to each prompt, which is nearly all of a sequence.
    assert comparison["tokens_grouped"] < 0.3 * comparison["tokens_ungrouped"]
    assert comparison["times_faster"] > 0


def test_a_wrong_file_ends_the_run_in_one_line(tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "SuperGLUE" / "WiC" / "val.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"word": "a", "sentence1": "b", "sentence2": "c", "label": -1}\n')
    arguments = ["no_model", "--data", str(tmp_path), "--tasks", "WiC", "--output", str(tmp_path)]
    assert run(monkeypatch, *arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}:1: label: -1 is no label of WiC")
