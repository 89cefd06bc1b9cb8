"""The plan tool: its table, its options, errors."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.megatron.models import HAS_HYBRID_MODEL

ROOT = Path(__file__).resolve().parents[2]
QWEN = ROOT / "examples" / "configs" / "qwen2.5-7b.yaml"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan_tool", ROOT / "tools" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["plan.py", *args])
    return tool.main()


def test_table_json_and_picture(tool, monkeypatch, capsys, tmp_path) -> None:
    picture = tmp_path / "plan.png"
    shapes = tmp_path / "shapes.yaml"
    shapes.write_text("- {prefix: 8192, responses: [512, 256, 700]}\n- {prefix: 2, responses: [9]}")
    code = _run(
        tool, monkeypatch, "--model", str(QWEN), "--shapes", str(shapes), "--tp", "4", "--pp", "2",
        "--vpp", "2", "--cp", "2", "--dp", "2", "--json", "--tflops", "400", "--gb-per-second",
        "20", "--groups", "4", "--png", str(picture),
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert result["grouped"]["microbatches_per_rank"] == 2
    assert len(result["grouped"]["pipeline_ranks"]) == 2
    assert result["grouped"]["memory_bytes"] == max(
        stage["total"] for stage in result["grouped"]["pipeline_ranks"]
    )
    assert result["grouped"]["seconds"] < result["ungrouped"]["seconds"]
    assert out.startswith("32 ranks (one GPU each) = tensor 4 x pipeline 2 x context 2 x data 2\n")
    for words in ("tokens", "PFLOPs", "MB received in a layer", "pipeline 1", "grouped"):
        assert words in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_whole_runs_file_will_do_and_options_replace_its_keys(
    tool, monkeypatch, capsys, tmp_path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        QWEN.read_text()
        + "parallel: {tensor_model_parallel_size: 4}\n"
        + "training: {steps: 3, token_budget: 20480, recompute: full}\n"
        + "rollouts: {paths: [rollouts.jsonl]}\n"
    )
    totals = {}
    for options in ((), ("--recompute", "none"), ("--tp", "2")):
        code = _run(
            tool, monkeypatch, "--model", str(path), "--case", "4,8192,256", "--json", *options
        )
        assert code == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        totals[options] = result["grouped"]["pipeline_ranks"][0]
    assert totals["--recompute", "none"]["activations"] > 3 * totals[()]["activations"]
    assert totals["--tp", "2"]["parameters"] > 1.9 * totals[()]["parameters"]


def test_a_prompt_that_runs_once_across_microbatches(tool, monkeypatch, capsys) -> None:
    results = {}
    options = ("--case", "64,4096,512", "--token-budget", "8192", "--tp", "4", "--json")
    for name, more in (("series", ["--share-across-microbatches"]), ("pieces", [])):
        assert _run(tool, monkeypatch, "--model", str(QWEN), *options, *more) == 0
        out = capsys.readouterr().out
        assert ("of them a series, all ranks" in out) == (name == "series")
        results[name] = json.loads(out.splitlines()[-1])["grouped"]
    series, pieces = results["series"], results["pieces"]
    assert (series["series"], series["microbatches_per_rank"]) == (1, 1)
    assert (pieces["series"], pieces["microbatches_per_rank"]) == (0, 8)
    assert pieces["tokens"] - series["tokens"] == pytest.approx(7 * 4095, abs=8 * 4)
    assert 1.6 < pieces["flops"] / series["flops"] < 1.75
    # The root waits while a row runs: its keys, values and their gradients come on top.
    assert series["memory_bytes"] > pieces["memory_bytes"]


@pytest.mark.skipif(not HAS_HYBRID_MODEL, reason="megatron-core before 0.18")
def test_a_model_with_mamba_layers_has_a_line_of_what_they_receive(
    tool, monkeypatch, capsys, tmp_path
) -> None:
    path = tmp_path / "model.yaml"
    model = {
        "vocab_size": 512,
        "max_sequence_length": 8192,
        "hybrid_layer_pattern": "M-|M*-M",
        "transformer": {
            "hidden_size": 256,
            "ffn_hidden_size": 1024,
            "num_attention_heads": 8,
            "mamba_head_dim": 32,
            "mamba_state_dim": 64,
        },
    }
    results = {}
    for pattern in ("M-|M*-M", "*-|**-*"):
        path.write_text(yaml.safe_dump({"model": {**model, "hybrid_layer_pattern": pattern}}))
        code = _run(
            tool, monkeypatch, "--model", str(path), "--case", "8,4096,256", "--tp", "2", "--pp",
            "2", "--cp", "2", "--json",
        )  # fmt: skip
        out = capsys.readouterr().out
        assert code == 0
        assert ("MB received in a recurrent one" in out) == ("M" in pattern)
        results[pattern] = json.loads(out.splitlines()[-1])["grouped"]
    mamba, attention = results.values()
    # The same attention layer; the states of 16 heads are less than the keys of a prompt.
    key, of_recurrent = (
        f"context_parallel_bytes_per_{layer}" for layer in ("layer", "recurrent_layer")
    )
    assert mamba[key] == attention[key] > mamba[of_recurrent] > 0 == attention[of_recurrent]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--case", "8,16"), "'8,16' is not G,prefix,response"),
        (("--case", "0,16,4"), "must be at least 1"),
        ((), "give either --case or --shapes"),
        (("--case", "2,9,9", "--dp", "0"), "--dp: 0 must be at least 1"),
        (("--case", "2,9,9", "--gb-per-second", "3"), "--gb-per-second needs --tflops"),
    ],
)
def test_wrong_options_are_named(tool, monkeypatch, capsys, arguments, message) -> None:
    with pytest.raises(SystemExit) as exit_:
        _run(tool, monkeypatch, "--model", str(QWEN), *arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tp", "3"), "must be a multiple of tensor_model_parallel_size (3)"),
        (("--pp", "3"), "model.transformer.num_layers: 28 does not divide by the 3 pipeline"),
        (("--token-budget", "100"), "over token_budget=100"),
        (("--ep", "2", "--dp", "1"), "expert_model_parallel_size: 2"),
        (("--share-across-microbatches", "--cp", "2"), "parallel.context_parallel_size: 2"),
    ],
)
def test_impossible_layouts_are_named(tool, monkeypatch, capsys, arguments, message) -> None:
    code = _run(tool, monkeypatch, "--model", str(QWEN), "--case", "2,200,50", *arguments)
    assert code == 2
    assert message in capsys.readouterr().err


def test_a_file_without_a_model_is_refused(tool, monkeypatch, capsys, tmp_path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("training: {steps: 1}\n")
    assert _run(tool, monkeypatch, "--model", str(path), "--case", "2,9,9") == 2
    assert f"{path}: model: required" in capsys.readouterr().err
